"""Decides, without importing Triton, which inputs the Triton kernel can do."""

import torch

from kvzip_press.kernels import triton_support
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def reason_against_triton(inputs: RaggedInputs, softcap: float | None) -> str | None:  # noqa: ARG001  # as dispatch asks
    """Returns why the Triton kernel cannot do this input, or None if it can."""
    query, (keys, values) = inputs.query, inputs.dense
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}, not one of {DTYPES}"
    if query.shape[-1] != values.shape[-1] or not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        return (
            f"head_dim {query.shape[-1]} and value_head_dim {values.shape[-1]} are not one number up to {MAX_HEAD_DIM}"
        )
    tensors = [query, keys, values, inputs.tail_keys, inputs.tail_values]
    if any(tensor is not None and tensor.numel() and tensor.stride(-1) != 1 for tensor in tensors):
        return "the last dimension of a tensor is not contiguous"
    return triton_support.reason_against_triton(query.device)
