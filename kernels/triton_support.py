"""Decides, without importing Triton, whether Triton kernels can run."""

import os
from functools import cache
from importlib.util import find_spec

import torch


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
