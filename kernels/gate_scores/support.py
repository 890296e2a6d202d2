"""Decides, without importing Triton, which inputs the Triton implementation of :func:`gate_scores` can do."""

import torch
from torch import Tensor

from kvzip_press.kernels.triton_support import reason_against_triton

MAX_NUMBERS = 1024  # most numbers in one token's queries of a KV head, groups x dim: padded, they fit a tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reason_against(queries: Tensor, keys: Tensor, *parameters: Tensor) -> str | None:
    """Returns why the Triton kernel cannot score ``queries`` and ``keys``, or None if it can."""
    reason = reason_against_triton(queries.device)
    if reason is not None:
        return reason
    if queries.dtype not in DTYPES:
        return f"the dtype is {queries.dtype}: the kernel does float32, float16 and bfloat16"
    if queries.shape[2:].numel() > MAX_NUMBERS:
        return f"groups x dim is {queries.shape[2:].numel()}: the kernel does 1 to {MAX_NUMBERS}"
    if any(tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 for tensor in (queries, keys)):
        return "the numbers of a head do not lie side by side in memory (a stride of the last dimension is not 1)"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (queries, keys, *parameters)):
        return "a gradient is wanted: the kernel has none"
    return None
