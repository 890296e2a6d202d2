"""Decides, without importing Triton, whether Triton kernels can run."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Returns whether Triton kernels run in its interpreter, on a CPU: the user has set ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason_against_triton(device: torch.device) -> str | None:
    """Returns why no Triton kernel can run on tensors of ``device``, or None if one can."""
    if not _is_installed():
        return "the package triton is not installed (the extra `gpu` brings it)"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"the device is {device.type}: Triton needs a CUDA device, or TRITON_INTERPRET=1 to run on a CPU, slowly"


def reason_against_heads(first: Tensor, *others: Tensor) -> str | None:
    """Returns why kernels that take rows of heads cannot take these, all [..., head_dim], or None if they can."""
    reason = reason_against_triton(first.device)
    if reason is not None:
        return reason
    if first.dtype not in DTYPES:
        return f"the dtype is {first.dtype}: the kernels do float32, float16 and bfloat16"
    head_dim = first.shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim is {head_dim}: the kernels do 1 to {MAX_HEAD_DIM}"
    if any(tensor.numel() and tensor.stride(-1) != 1 and head_dim > 1 for tensor in (first, *others)):
        return "the numbers of a head do not lie side by side in memory (a stride of the last dimension is not 1)"
    return None


@cache
def _is_installed() -> bool:
    """Returns whether there is a package triton; looking through the path takes as long as a small kernel on a CPU."""
    return find_spec("triton") is not None


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors; a small one for a CPU, where the interpreter runs programs in turn."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
