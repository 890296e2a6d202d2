"""Decides, without importing Triton, which codes the Triton kernel reads."""

from kvzip_press.kernels import triton_support
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.support import DTYPES, MAX_HEAD_DIM
from kvzip_press.kernels.row_codec import CODECS, Codes

READ = {"keys": ("int8", "fp8", "int4"), "values": ("int8", "fp8", "int4", "int2")}
"""Codecs that the kernel reads of rows."""
READ_IN_GROUPS = {"keys": ("int4", "int2"), "values": ()}
"""Codecs that it reads where rows share the scales of their channels."""


def reason_against_triton(inputs: RaggedInputs, softcap: float | None) -> str | None:  # noqa: ARG001  # as dispatch asks
    """Returns why the Triton kernel cannot do this input, or None if it can."""
    query, keys, values = inputs.query, inputs.keys, inputs.values
    assert isinstance(keys, Codes)
    assert isinstance(values, Codes)
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}, not one of {DTYPES}"
    if keys.head_dim != values.head_dim or not 1 <= keys.head_dim <= MAX_HEAD_DIM:
        return f"head_dim {keys.head_dim} and value_head_dim {values.head_dim} are not one number up to {MAX_HEAD_DIM}"
    for name, codes in (("keys", keys), ("values", values)):
        in_groups = codes.groups is not None
        reads = (READ_IN_GROUPS if in_groups else READ)[name]
        if codes.codec not in reads:
            return f"{name} are {codes.codec}{' in groups' if in_groups else ''}, not one of {reads}"
        if codes.head_dim * CODECS[codes.codec].bits % 16 or codes.codes.data_ptr() % 2:
            return f"{name} do not fill whole words of 16 bits: head_dim is {codes.head_dim}"
    tensors = [query, inputs.context_query, inputs.tail_keys, inputs.tail_values]
    if any(tensor is not None and tensor.numel() and tensor.stride(-1) != 1 for tensor in tensors):
        return "the last dimension of a tensor is not contiguous"
    return triton_support.reason_against_triton(query.device)
