"""Decides, without importing Triton, which inputs the Triton implementation of :func:`recall_ranking` can do."""

import torch

from kvzip_press.kernels import triton_support
from kvzip_press.kernels.recall_ranking.inputs import RankingInputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_GROUPS = 16384  # of a segment: one program holds the worths of all of them in registers


def reason_against(inputs: RankingInputs) -> str | None:
    """Returns why the Triton kernels cannot do this input, or None if they can."""
    reason = triton_support.reason_against_triton(inputs.query.device)
    if reason is not None:
        return reason
    if inputs.query.dtype not in DTYPES:
        return f"the dtype is {inputs.query.dtype}, not one of {DTYPES}"
    if not 1 <= inputs.query.shape[2] <= MAX_HEAD_DIM:
        return f"head_dim is {inputs.query.shape[2]}: the kernel does 1 to {MAX_HEAD_DIM}"
    if inputs.n_groups > MAX_GROUPS:
        return f"a segment has {inputs.n_groups} groups: the kernel does up to {MAX_GROUPS}"
    if any(tensor.numel() and tensor.stride(-1) != 1 for tensor in (inputs.query, inputs.marks)):
        return "the last dimension of query or marks is not contiguous"
    return None
