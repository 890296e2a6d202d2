"""Undoes the state that kvpress keeps on a model's modules: it never outlives the call that made it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """When left, restores every attribute, submodule, parameter, buffer and hook table of the modules."""
    before = []
    for module in modules:
        attributes = dict(vars(module))
        tables = [(table, dict(table)) for table in attributes.values() if isinstance(table, dict)]
        before.append((vars(module), attributes, tables))
    try:
        yield
    finally:
        for current, attributes, tables in before:
            current.clear()
            current.update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)


@contextmanager
def untouched_model(model: nn.Module) -> Iterator[None]:
    """Does what :func:`untouched` does for a whole model, and restores the attention implementation in its configs."""
    modules = list(model.modules())
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    names = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    try:
        with untouched(modules):
            yield
    finally:
        for config, name in names:
            if getattr(config, "_attn_implementation", None) != name:
                config._attn_implementation = name


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
