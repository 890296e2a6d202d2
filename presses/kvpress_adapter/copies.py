"""Copies kvpress's presses, which keep state of their runs on themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def presses_in(press: Any) -> list[Any]:
    """Returns a kvpress press and all presses that it wraps."""
    found, todo = [], [press]
    while todo:
        one = todo.pop(0)
        found.append(one)
        for value in vars(one).values():
            todo += [inner for inner in _flat(value) if hasattr(inner, "post_init_from_model")]
    return found


def fresh_copy(press: Any) -> Any:
    """Returns a press with the same settings, whose runs leave the original as it was.

    Loaded weights are shared, not copied.
    """
    constants = [
        item
        for one in presses_in(press)
        for value in vars(one).values()
        for item in _flat(value)
        if isinstance(item, (nn.Module, torch.Tensor))
    ]
    return copy.deepcopy(press, {id(constant): constant for constant in constants})


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
