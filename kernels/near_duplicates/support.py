"""Decides, without importing Triton, which inputs the Triton implementation of :func:`near_duplicates` can do."""

import torch
from torch import Tensor

from kvzip_press.kernels.triton_support import reason_against_triton

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reason_against(keys: Tensor) -> str | None:
    """Returns why the Triton kernel cannot compare ``keys``, or None if it can."""
    reason = reason_against_triton(keys.device)
    if reason is not None:
        return reason
    if keys.dtype not in DTYPES:
        return f"the dtype is {keys.dtype}: the kernel does float32, float16 and bfloat16"
    head_dim = keys.shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim is {head_dim}: the kernel does 1 to {MAX_HEAD_DIM}"
    if keys.numel() and keys.stride(-1) != 1 and head_dim > 1:
        return "the numbers of a key do not lie side by side in memory (the stride of the last dimension is not 1)"
    return None
