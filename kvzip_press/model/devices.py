"""Where a model computes, and in what: devices and dtypes by name."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def input_device(model: Any) -> torch.device:
    """Where a model's token ids go: the device that its embedding computes on, wherever its weights rest."""
    return execution_device(model.get_input_embeddings())


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module computes on: what its offloading hook says (accelerate), or where its weights are."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(chain(module.parameters(), module.buffers())).device  # packed weights are buffers


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device, so that a wall clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def get_device(name: str | None) -> torch.device:
    """The device of a name, by default the GPU where there is one.

    Raises:
        InvalidArgumentError: No such device.
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
    """The dtype of a name; None, for a default, stays None.

    Raises:
        InvalidArgumentError: No such dtype.
    """
    if name is not None and name not in DTYPES:
        raise InvalidArgumentError(f"expected a dtype among {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else DTYPES[name]
