"""Twins of modules: the same weights in modules of their own, which can be changed while other threads use the model.

Whoever has to replace a ``forward``, set an attribute, add a hook, or keep a module's state from changing for a while,
does it to a twin, and throws the twin away. Nothing is ever patched on the model itself.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from torch import nn

_PLAIN = frozenset({type(None), bool, int, float, str})


def twin_of(module: nn.Module, only: Collection[nn.Module] | None = None) -> Any:
    """Returns a copy of a module in which every submodule is a copy, too; parameters and buffers are the same tensors.

    A twin has attributes, hooks, and tables of parameters and buffers of its own. Configs are copied as well. What is
    set on a twin, or registered with it, is therefore seen by nobody else; only what is written into a tensor is.
    A ``forward`` that was put on an instance (by accelerate, or by ``torch.compile``) becomes that of the twin. It
    takes some 10 microseconds a module.

    Args:
        module: The module.
        only: If given, these submodules are copied and the modules on the way to them; all others are shared, and so
            are configs.
    """
    copied = _on_the_way(module, set(only)) if only is not None else set(module.modules())
    twins: dict[int, Any] = {id(one): type(one).__new__(type(one)) for one in copied}
    if only is None:
        configs = {id(config): config for one in copied if (config := vars(one).get("config")) is not None}
        twins |= {key: copy.copy(config) for key, config in configs.items()}
    for one in copied:
        attributes = tuple(vars(one).items())  # in one step: other threads may set some
        vars(twins[id(one)]).update({name: _of_twin(name, value, twins) for name, value in attributes})
    return twins[id(module)]


def _on_the_way(module: nn.Module, only: set[nn.Module]) -> set[nn.Module]:
    found = {module}
    for child in module.children():
        if any(one in only for one in child.modules()):
            found |= _on_the_way(child, only)
    return found


def _of_twin(name: str, value: Any, twins: dict[int, Any]) -> Any:
    """Returns what an attribute of a module is on its twin."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is set:
        return set(value)
    if (kind is dict or kind is OrderedDict) and name.startswith("_"):  # submodules, parameters, buffers and hooks
        items = tuple(value.items())  # in one step: other threads may add hooks and remove them
        return kind((key, twins.get(id(item), item)) for key, item in items) if items else kind()
    if name == "_compiled_call_impl":  # of module.compile(): it calls the original
        return None
    return _rebound(value, twins)


def _rebound(value: Any, twins: dict[int, Any]) -> Any:
    """Returns a value with the twins of all modules and configs that it is, or that a callable is bound to."""
    if id(value) in twins:
        return twins[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if isinstance(value, functools.partial):
        args = [_rebound(arg, twins) for arg in value.args]
        named = {key: _rebound(arg, twins) for key, arg in value.keywords.items()}
        return functools.partial(_rebound(value.func, twins), *args, **named)
    compiled_from = getattr(value, "_torchdynamo_orig_callable", None)
    return value if compiled_from is None else _rebound(compiled_from, twins)
