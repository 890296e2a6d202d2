"""Which weights make a model's keys and values: a fingerprint of all that its decoder computes with.

A key of layer 7 depends on the embedding and on everything in the layers below, so a cache belongs to the whole decoder
and not to one projection; the head above it counts for nothing. What counts besides the numbers is what chooses among
them: of a layer with adapters (peft's) those that are active, of any module that is not torch's or transformers' the
plain values that it holds, and what forward hooks compute with.
"""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvzip_press.errors import UnsupportedModelError
from kvzip_press.model.choices import choices, held_outside, is_plain, passive_parts, settings
from kvzip_press.model.tensor_digest import digests_of, looks_of, plain_parts

#: Begins every fingerprint that counts all weights; older ones counted 64 values of each attention weight.
MARK = "w2:"
_PUT_AWAY: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()  # offloading hook -> weight -> digest
_SEEN: WeakKeyDictionary[nn.Module, tuple[str, Any]] = WeakKeyDictionary()  # module -> fingerprint, traces
_REMEMBERED: dict[str, dict[str, str]] = {}  # the newest fingerprints -> what they count, to name a difference


def weights_fingerprint(module: nn.Module) -> str:
    """Returns a digest of all that a module (a decoder, or one attention module) computes with.

    Weights that are the same have the same digest wherever they lie, tied or not, offloaded by accelerate or not. The
    first call reads them all; later ones read what has changed since.

    Raises:
        UnsupportedModelError: Weights are neither in memory nor offloaded by accelerate, or cannot be read.
    """
    seen = _SEEN.get(module)
    if seen is not None and looks_unchanged(module, seen[0]):
        return seen[0]
    entries = _entries(module)
    text = "\n".join(f"{name} {value}" for name, value in sorted(entries.items()))
    fingerprint = MARK + hashlib.sha256(text.encode()).hexdigest()[:32]
    _SEEN[module] = fingerprint, _traces(module)
    _REMEMBERED.pop(fingerprint, None)
    _REMEMBERED[fingerprint] = entries
    while len(_REMEMBERED) > 8:
        _REMEMBERED.pop(next(iter(_REMEMBERED)), None)  # another thread may have done it
    return fingerprint


def looks_unchanged(module: nn.Module, fingerprint: str) -> bool:
    """Returns whether a module had this fingerprint and nothing tells that it has changed since; takes no digest.

    Every tensor is the same object in the same place, of the same version and with the same few values, and what
    chooses among them is the same: all that a digest is made again for, without gathering names and texts.
    """
    seen, traces = _SEEN.get(module, ("", None))
    return seen == fingerprint and traces is not None and traces == _traces(module)


def _traces(root: nn.Module) -> list[Any] | None:
    """Returns what a change of a module's weights changes; None where that takes more than a look (quantised, away)."""
    traces: list[Any] = []
    tensors: list[torch.Tensor] = []
    for module in root.modules():
        tensors += [
            t for t in chain(vars(module)["_parameters"].values(), vars(module)["_buffers"].values()) if t is not None
        ]
        for choice in () if is_plain(module) else choices(module, root):
            if isinstance(choice, torch.Tensor):
                tensors.append(choice)
            else:
                traces.append(choice)
    if any(type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta for tensor in tensors):
        return None
    looks = looks_of(tensors)
    return None if looks is None else [*traces, *looks]


def first_difference(one: str, other: str) -> str:
    """Returns the name of the first weight or setting in which two fingerprints of this process differ, else ''."""
    ours, theirs = _REMEMBERED.get(one), _REMEMBERED.get(other)
    if ours is None or theirs is None:
        return ""
    return next((name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)), "")


def _entries(root: nn.Module) -> dict[str, str]:
    """Returns the name of each weight and setting that counts -> its digest or text."""
    modules = dict(root.named_modules())
    passive = tuple(name for prefix, module in modules.items() for name in passive_parts(prefix, module))
    entries: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in root.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or f"{name}.".startswith(passive):
            continue
        prefix, _, leaf = name.rpartition(".")
        owner = modules.get(prefix, root)
        away = _digest_put_away(owner, leaf)
        if away is not None:
            entries[_usual(name)] = away
        else:
            _add(tensors, entries, _usual(name), in_memory(owner, name, tensor))
    for prefix, module in modules.items():
        for name, value in settings(module):
            entries[_usual(f"{prefix}.{name}")] = value
        for name, held in held_outside(module, root):
            if isinstance(held, torch.Tensor):
                _add(tensors, entries, f"{prefix}.{name}", held)
            else:
                entries[f"{prefix}.{name}"] = held
    return entries | dict(zip(tensors, digests_of(list(tensors.values())), strict=True))


def _usual(name: str) -> str:
    """Returns the name that a weight has in a model without adapters."""
    return name.replace(".base_layer.", ".")


def _add(tensors: dict[str, torch.Tensor], entries: dict[str, str], name: str, value: torch.Tensor) -> None:
    for part, plain in plain_parts(value):
        if plain is None:
            entries[name + part] = str(tuple(value.shape))  # how it is stored
        else:
            tensors[name + part] = plain


def in_memory(owner: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a weight's values, even if accelerate has put them away and left a tensor on "meta" in their place.

    Args:
        owner: The module that the weight is a part of.
        name: Its name, whose last part is its name there.
        tensor: What the module holds under that name.

    Raises:
        UnsupportedModelError: The values are nowhere.
    """
    if tensor.device.type != "meta":
        return tensor
    hook = _offloading_hook(owner)
    if hook is None:
        raise UnsupportedModelError(
            f"expected weights in memory, or offloaded by accelerate, got {type(owner).__name__} {name} on meta"
        )
    values: torch.Tensor = hook.weights_map[name.rpartition(".")[2]]
    return values


def _offloading_hook(owner: nn.Module) -> Any:
    """Returns the hook by which accelerate brings a module's weights for a forward; None if they stay in memory."""
    hook: Any = getattr(owner, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "weights_map", None) is not None and one.offload), None)


def _digest_put_away(owner: nn.Module, leaf: str) -> str | None:
    """Returns the digest of an offloaded weight, which is read from its place once; None for one that is not."""
    hook = _offloading_hook(owner)
    if hook is None:
        return None
    digests = _PUT_AWAY.setdefault(hook, {})
    if leaf not in digests:
        try:
            values = hook.weights_map[leaf]
        except KeyError:
            return None
        digests[leaf] = digests_of([values])[0]
    return digests[leaf]
