"""What chooses among a model's weights: active adapters, settings of modules, hooks that compute with weights."""

from __future__ import annotations

import dis
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import nn

# Modules of these say all that they compute with in their weights and in the config.
_LIBRARIES = {"torch", "transformers", "transformers_modules", "accelerate"}
# Hooks of these look at a forward, or move weights.
_WATCHING = {*_LIBRARIES, "kvzip_press", "kvpress"}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DEPTH = 3
_WRITING = {"STORE_DEREF", "STORE_GLOBAL", "STORE_ATTR"}
_GATHERING = {"append", "extend", "insert", "update", "setdefault"}


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
    if not _is_foreign(module):
        return []
    written = _facts(type(module).forward).written  # counters
    held = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE | written}
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


def is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's or transformers' own, without a hook or a ``forward`` put on it: no choices."""
    held = vars(module)
    return not (held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held or _is_foreign(module))


def choices(module: nn.Module, root: nn.Module) -> Iterator[torch.Tensor | str]:
    """Yields what a change of a module's settings, or of what others compute in it, changes: tensors and texts."""
    yield from (f"{name}={text}" for name, text in settings(module))
    yield from (
        held if isinstance(held, torch.Tensor) else f"{name}={held}" for name, held in held_outside(module, root)
    )


def _has_adapters(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def _active(module: Any) -> list[str]:
    """Returns the adapters that a layer adds to its base: none if they are disabled, or merged into it."""
    if getattr(module, "disable_adapters", False) is True or getattr(module, "merged", False) is True:
        return []
    active: Any = module.active_adapters
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


def held_outside(module: nn.Module, root: nn.Module) -> Iterator[tuple[str, torch.Tensor | str]]:
    """Yields what a module computes with that is neither weight nor setting, by name: tensors, and texts beside them.

    These are tensors that a module of others holds as plain attributes; and what functions of others hold that run in
    its forward: its hooks, and a ``forward`` that was put on it. A function that may return something changes what the
    module computes: it counts, with its instructions and all that it holds. One that only looks counts if it holds
    weights: a tensor or another module, or a list or dict with parameters in it. What a function writes itself is its
    log or counter, and would make another model of each forward: that does not count.

    Args:
        module: The module.
        root: The whole of which it is a part; what functions hold of it is counted already.
    """
    if _is_foreign(module):
        written = _facts(type(module).forward).written
        yield from ((name, value) for name, value in _plain_tensors(module) if name not in written)
    index = 0  # of those that count, so that others may come and go
    for function in _computing(module):
        facts, held = _facts(function), _held(function)
        kept = {name: value for name, value in held.items() if name not in facts.written and not _inside(value, root)}
        deep = facts.changes and not facts.gathers
        weights = [(name, one) for name, value in kept.items() for one in _weights(value, _DEPTH, deep=deep)]
        if not weights and not facts.changes:
            continue
        prefix, index = f"hook{index}.", index + 1
        yield from ((f"{prefix}{name}.{number}", one) for number, (name, one) in enumerate(weights))
        texts = ((name, _chosen(value, numbers=facts.changes)) for name, value in kept.items())
        yield from ((prefix + name, text) for name, text in texts if text)
        if facts.changes:
            yield f"{prefix}code", facts.digest


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a module that its state dict leaves out."""
    unsaved = {name: vars(module)["_buffers"].get(name) for name in vars(module)["_non_persistent_buffers_set"]}
    for name, value in {**unsaved, **vars(module)}.items():
        if isinstance(value, torch.Tensor):
            yield name, value


def _inside(value: Any, root: nn.Module) -> bool:
    """Whether a variable is a part of the whole, or a module around it."""
    return isinstance(value, nn.Module) and (value in set(root.modules()) or root in set(value.modules()))


def _is_foreign(module: nn.Module) -> bool:
    kind: Any = type(module)  # mypy takes the hash of a class for that of its modules
    return not _is_known(kind)


def _computing(module: nn.Module) -> list[Any]:
    """Returns the functions of others that run in a module's forward: hooks, and a forward that was put on it."""
    hooks = [  # a list made in one step: other threads add hooks and remove them
        *module._forward_hooks.values(),  # noqa: SLF001  # no public name
        *module._forward_pre_hooks.values(),  # noqa: SLF001
    ]
    if (own := vars(module).get("forward")) is not None:
        hooks.append(own)
    return [hook for hook in hooks if _origin(hook) not in _WATCHING] if hooks else []


def _function(hook: Any) -> Any:
    """Returns the Python function that is called in the end; the object itself if there is none."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    return function if hasattr(function, "__code__") else type(function).__call__


def _origin(hook: Any) -> str:
    """Returns the library that a hook is code of, whatever it says to stand for (`functools.wraps`)."""
    function = _function(hook)
    name = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", "")
    return str(name).partition(".")[0]


@dataclass(frozen=True)
class _Facts:
    """What the instructions of a function tell.

    Attributes:
        changes: Whether it may return something. A hook that does replaces what it was given.
        gathers: Whether it puts something into a list or dict.
        written: Names of the variables and attributes that it writes.
        read: Names of the globals that it reads.
        digest: Of its instructions and constants.
    """

    changes: bool = False
    gathers: bool = False
    written: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    digest: str = ""


def _facts(hook: Any) -> _Facts:
    code = getattr(_function(hook), "__code__", None)
    return _Facts() if code is None else _facts_of(code)


@functools.lru_cache(maxsize=256)
def _facts_of(code: CodeType) -> _Facts:
    steps = list(dis.get_instructions(code))
    gathers = any(step.opname == "STORE_SUBSCR" or step.argval in _GATHERING for step in steps)
    returned = [before for before, step in pairwise(steps) if step.opname == "RETURN_VALUE"]
    returned += [step for step in steps if step.opname == "RETURN_CONST"]
    changes = any("CONST" not in step.opname or step.argval is not None for step in returned)
    return _Facts(
        changes=changes and not (gathers and code.co_name == "<lambda>"),  # `lambda ...: seen.append(...)` gives None
        gathers=gathers,
        written=frozenset(str(step.argval) for step in steps if step.opname in _WRITING),
        read=frozenset(str(step.argval) for step in steps if step.opname == "LOAD_GLOBAL"),
        digest=hashlib.sha256(_text_of_code(code).encode()).hexdigest()[:32],
    )


def _text_of_code(code: CodeType) -> str:
    constants = [_text_of_code(one) if isinstance(one, CodeType) else _text(one, 0) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _held(hook: Any) -> dict[str, Any]:
    """Returns the variables that a function carries along: arguments, attributes, those around it, and globals."""
    held: dict[str, Any] = {}
    while isinstance(hook, functools.partial):
        held |= {**{str(i): value for i, value in enumerate(hook.args)}, **hook.keywords}
        hook = hook.func
    owner = getattr(hook, "__self__", None if hasattr(hook, "__code__") else hook)
    if owner is not None:
        held |= {"self": owner} if isinstance(owner, nn.Module) else dict(getattr(owner, "__dict__", {}))
    function = _function(hook)
    if (code := getattr(function, "__code__", None)) is None:
        return held
    arguments = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    held |= dict(zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True))
    held |= function.__kwdefaults__ or {}
    held |= {name: function.__globals__[name] for name in _facts_of(code).read if name in function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            held[name] = cell.cell_contents
    return held


def _weights(value: Any, depth: int, *, deep: bool) -> Iterator[torch.Tensor]:
    """Yields the tensors in a variable of a hook; those in lists and dicts that are no parameters only if ``deep``."""
    if isinstance(value, torch.Tensor):
        if deep or depth == _DEPTH or isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict(keep_vars=True).values()
    elif depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _weights(item, depth - 1, deep=deep)


def _chosen(value: Any, *, numbers: bool) -> str:
    """Returns the texts and truths in a hook's variable; also numbers and arrays, which may be a counter or a log."""
    if numbers and isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return hashlib.sha256(value.tobytes()).hexdigest()[:32]
    if numbers and isinstance(value, nn.Module):
        return ",".join(f"{name}={text}" for module in value.modules() for name, text in settings(module))
    if numbers:
        return _text(value, _DEPTH)
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
