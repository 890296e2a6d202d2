"""Where and in which precision a model computes: devices and dtypes, also by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError

T = TypeVar("T")

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def input_device(model: Any) -> torch.device:
    """Returns the device for a model's token ids: that on which its embedding computes, wherever its weights are."""
    return execution_device(model.get_input_embeddings())


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device that a module computes on: that of its offloading hook (accelerate), or of its weights."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(chain(module.parameters(), module.buffers())).device  # packed weights are buffers


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device, so that wall-clock times are right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Returns the seconds of a clock, once the device has done all that it was given."""
    synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, function: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """Returns what a function returns, and the seconds that it and the device take for it."""
    begin = now(device)
    value = function(*arguments)
    return value, now(device) - begin


def reachable(device: torch.device | str) -> torch.device:
    """Returns a device that tensors can be put on.

    Raises:
        InvalidArgumentError: There is no such device, or this PyTorch cannot use it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise InvalidArgumentError(
            f"expected a device that PyTorch can use here, got {str(device)!r:.80} ({reason:.120})"
        ) from error
    return found


def get_device(name: str | None) -> torch.device:
    """Returns the device of a name; for None the GPU if there is one, else the CPU.

    Raises:
        InvalidArgumentError: There is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        have = "cpu, cuda or cuda:<index>" if torch.cuda.is_available() else "cpu (torch sees no GPU here)"
        raise InvalidArgumentError(f"expected the device {have}, got {name!r}")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidArgumentError(f"expected the device cpu, cuda or cuda:<index>, got {name!r}") from error


def get_dtype(name: str | None) -> torch.dtype | None:
    """Returns the dtype of a name, a key of :data:`DTYPES`; None stays None.

    Raises:
        InvalidArgumentError: There is no such dtype.
    """
    if name is not None and name not in DTYPES:
        raise InvalidArgumentError(f"expected a dtype among {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else DTYPES[name]
