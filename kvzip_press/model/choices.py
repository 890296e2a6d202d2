"""What chooses among a model's weights: active adapters, settings of modules, hooks that compute with weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

# Modules of these say all that they compute with in their weights and in the config.
_LIBRARIES = {"torch", "transformers", "transformers_modules", "accelerate"}
# Hooks of these look at a forward, or move weights.
_WATCHING = {*_LIBRARIES, "kvzip_press", "kvpress"}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DEPTH = 3


def passive_parts(prefix: str, module: nn.Module) -> list[str]:
    """Returns the names, each with a dot behind it, of a module's adapters that are not active.

    A layer with adapters is told as peft makes it: a ``base_layer``, and one item an adapter in each of several dicts.
    """
    if not _has_adapters(module):
        return []
    active, dot = _active(module), f"{prefix}." if prefix else ""
    dicts = [
        (name, part) for name, part in module.named_children() if isinstance(part, nn.ModuleDict | nn.ParameterDict)
    ]
    return [f"{dot}{name}.{adapter}." for name, part in dicts for adapter in part if adapter not in active]


def settings(module: nn.Module) -> list[tuple[str, str]]:
    """Returns name and text of each plain value that a module holds, sorted; none for torch's and transformers' own.

    Of a layer with adapters, those of the active ones.
    """
    if _is_known(type(module)):
        return []
    held = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    if _has_adapters(module):
        active = _active(module)
        dicts = {name: value for name, value in held.items() if isinstance(value, dict)}
        held = {
            f"{name}.{adapter}": value[adapter]
            for name, value in dicts.items()
            for adapter in active
            if adapter in value
        }
    texts = {name: _text(value, _DEPTH) for name, value in held.items()}
    return sorted((name, text) for name, text in texts.items() if text)


def choices(module: nn.Module) -> list[Any]:
    """Returns what chooses among a module's own weights: its settings, and the forward hooks that may compute."""
    foreign = not _is_known(type(module))
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())  # noqa: SLF001  # no public name
    computing = [id(hook) for hook in hooks if _library(hook) not in _WATCHING] if hooks else []
    return [*computing, *(settings(module) if foreign else ())]


def _has_adapters(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def _active(module: Any) -> list[str]:
    """Returns the adapters that a layer adds to its base: none if they are disabled, or merged into it."""
    if getattr(module, "disable_adapters", False) is True or getattr(module, "merged", False) is True:
        return []
    active: Any = module.active_adapters
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


def held_by_hooks(module: nn.Module, root: nn.Module) -> Iterator[tuple[str, torch.Tensor | str]]:
    """Yields what a module's forward hooks compute with: tensors, and the texts and truths beside them.

    A hook counts if a variable of it is a tensor or another module, or a list or dict with parameters in it. One that
    gathers what it sees in a list does not: that would be another model after each forward.

    Args:
        module: The module.
        root: The whole of which it is a part; what hooks hold of it is counted already.
    """
    hooks = [  # a list made in one step: other threads add hooks and remove them
        *module._forward_hooks.values(),  # noqa: SLF001  # no public name
        *module._forward_pre_hooks.values(),  # noqa: SLF001
    ]
    for index, hook in enumerate(hooks):
        function, held = _taken_apart(hook)
        if _library(function) in _WATCHING:
            continue
        found = [(f"hook{index}.{name}", value) for name, one in held.items() for value in _weights(one, root, _DEPTH)]
        if found:
            yield from ((f"{name}.{number}", value) for number, (name, value) in enumerate(found))
            yield from ((f"hook{index}.{name}", text) for name, one in held.items() if (text := _chosen(one)))


def _taken_apart(hook: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a hook's function, and the variables that it carries along."""
    held: dict[str, Any] = {}
    while isinstance(hook, functools.partial):
        held |= {**{str(i): value for i, value in enumerate(hook.args)}, **hook.keywords}
        hook = hook.func
    owner = getattr(hook, "__self__", None if hasattr(hook, "__code__") else hook)
    if owner is not None:
        held |= {"self": owner} if isinstance(owner, nn.Module) else dict(getattr(owner, "__dict__", {}))
    function: Any = getattr(hook, "__func__", hook)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return function if hasattr(function, "__module__") else type(function), held


def _weights(value: Any, root: nn.Module, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if depth == _DEPTH or isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, nn.Module):
        parts = set(value.modules())
        if root not in parts and value not in set(root.modules()):
            yield from value.state_dict(keep_vars=True).values()
    elif depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _weights(item, root, depth - 1)


def _chosen(value: Any) -> str:
    """Returns the texts and truths in a hook's variable; numbers there are counters as often as not."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={item!r}" for name, item in value.items() if isinstance(item, str | bool))
    return repr(value) if isinstance(value, str | bool) else ""


def _text(value: Any, depth: int) -> str:
    """Returns a plain value as a text; empty for what is not plain, or holds nothing."""
    if isinstance(value, str | bool | int | float | torch.dtype):
        return repr(value)
    if isinstance(value, Mapping) and depth:
        items = [(str(name), _text(item, depth - 1)) for name, item in value.items()]
        return ",".join(f"{name}={text}" for name, text in sorted(items) if text)
    if isinstance(value, set | frozenset):
        return ",".join(sorted(_text(item, 0) for item in value))
    if isinstance(value, Sequence) and depth:
        return ",".join(filter(None, (_text(item, depth - 1) for item in value)))
    return ""


@functools.lru_cache(maxsize=1024)
def _is_known(kind: type) -> bool:
    """Returns whether modules of a class say all that they compute with in their weights and in the config."""
    return _library(kind) in _LIBRARIES


def _library(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]
