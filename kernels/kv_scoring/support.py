"""Decides, without importing Triton, which inputs the Triton implementation of :func:`kv_scoring` can do."""

import torch
from torch import Tensor

from kvzip_press.kernels.triton_support import reason_against_triton

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reason_against(query: Tensor, *keys: Tensor) -> str | None:
    """Returns why the Triton kernels cannot score ``keys`` (sink, chunk, replay) for ``query``, or None if they can."""
    reason = reason_against_triton(query.device)
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}: the kernels do float32, float16 and bfloat16"
    head_dim = query.shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim is {head_dim}: the kernels do 1 to {MAX_HEAD_DIM}"
    if any(tensor.numel() and tensor.stride(-1) != 1 and head_dim > 1 for tensor in (query, *keys)):
        return "the numbers of a head do not lie side by side in memory (a stride of the last dimension is not 1)"
    return None
