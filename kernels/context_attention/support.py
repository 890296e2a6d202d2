"""Decides, without importing Triton, which inputs the Triton kernel can do."""

from torch import Tensor

from kvzip_press.kernels import triton_support
from kvzip_press.kernels.ragged_attention.support import DTYPES, MAX_HEAD_DIM
from kvzip_press.kernels.row_codec import Codes


def reason_against_triton(
    query: Tensor,
    keys: Tensor | Codes,
    values: Tensor | Codes,
    softcap: float | None,  # noqa: ARG001  # as dispatch asks
) -> str | None:
    """Returns why the Triton kernel cannot do this input, or None if it can."""
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}, not one of {DTYPES}"
    head_dim, v_head_dim = query.shape[-1], values.shape[-1]
    if head_dim != v_head_dim or not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim} and value_head_dim {v_head_dim} are not one number up to {MAX_HEAD_DIM}"
    if query.numel() and query.stride(-1) != 1:
        return "the last dimension of query is not contiguous"
    for pool in (keys, values):
        if isinstance(pool, Codes) and pool.codec != "int8":
            return f"the codes are {pool.codec}, of which the kernel reads only int8"
        parts = (pool.codes, pool.scales) if isinstance(pool, Codes) else (pool,)
        if not all(part.is_contiguous() for part in parts):
            return "the pool is not contiguous"
    return triton_support.reason_against_triton(query.device)
