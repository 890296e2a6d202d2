"""Rotary position embeddings whose frequencies depend on how far a forward reads (dynamic NTK, longrope).

In one forward all tokens are turned by the frequencies of its last position. A forward that reads further than the ones
before it may use others; what was cached before was then turned by frequencies that no longer hold, and the model never
saw such a mixture. Nothing here knows how a kind of embedding works: what it does is found by asking a twin.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.model.structure import max_positions, text_config, text_decoder
from kvzip_press.model.twin import twin_of

_DEPENDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by rotary module


def depends_on_length(model: nn.Module) -> bool:
    """Whether a model, or a decoder, turns a position differently when it reads further; found once."""
    decoder = text_decoder(model)
    return any(_is_dependent(module, decoder) for module in rotary_modules(decoder))


def frequencies_differ(model: nn.Module, one: int, other: int) -> bool:
    """Whether forwards that read up to ``one`` and up to ``other`` tokens turn the same position differently."""
    return one != other and depends_on_length(model) and not _same(_turns(model, one), _turns(model, other))


def check_frequencies(model: nn.Module, held: Sequence[int], ends: Sequence[int]) -> None:
    """Raises if reading on would change the frequencies that a compressed cache was made with.

    Args:
        model: The model.
        held: For each row, the number of tokens that its cache has seen.
        ends: For each row, the most tokens that it will have seen.

    Raises:
        InvalidArgumentError: A row would cross a length at which the model changes its frequencies.
    """
    if not depends_on_length(model):
        return
    longest = max(ends)  # one forward turns all rows by the frequencies of the longest
    for row, seen in enumerate(held):
        if seen and frequencies_differ(model, seen, longest):
            raise InvalidArgumentError(
                f"expected to stay where this model's RoPE ({_kind(model)}) keeps its frequencies, got row {row} with "
                f"a context of {seen} tokens and up to {longest} tokens to read: the model would answer with other "
                "frequencies than those that the cached keys have. Ask for fewer tokens, or compress a context that "
                "ends on the same side of the change"
            )


def check_context(model: nn.Module, lengths: Sequence[int]) -> None:
    """Raises if contexts cannot be read into a cache for later questions, because frequencies would change.

    Args:
        model: The model.
        lengths: The number of tokens of each row.

    Raises:
        InvalidArgumentError: Every further token changes the frequencies, or rows of one batch need different ones.
    """
    if not depends_on_length(model):
        return
    longest, shortest = max(lengths), min(lengths)
    limit = max_positions(model)
    if (limit is None or longest < limit) and frequencies_differ(model, longest, longest + 1):
        raise InvalidArgumentError(
            f"expected a context of a length at which this model's RoPE ({_kind(model)}) keeps its frequencies, got "
            f"{longest} tokens: from there on each further token changes them, and a cache cannot follow"
        )
    if frequencies_differ(model, shortest, longest):
        raise InvalidArgumentError(
            f"expected contexts in one batch for which this model's RoPE ({_kind(model)}) has the same frequencies, "
            f"got {shortest} to {longest} tokens: compress them one by one"
        )


def pinned(decoder: nn.Module, length: int) -> Any:
    """Returns a twin of a decoder that shares its layers, and turns all it reads as a forward up to ``length`` does.

    The decoder itself, if its frequencies do not depend on the length.

    Raises:
        UnsupportedModelError: The embedding cannot be held at its frequencies.
    """
    if not depends_on_length(decoder):
        return decoder
    twin = with_own_rotation(decoder)
    pin(twin, decoder, length)
    return twin


def with_own_rotation(model: nn.Module) -> Any:
    """Returns a twin of a model that shares all but its rotary embedding, whose state other threads' forwards change.

    The model itself, if its frequencies do not depend on the length.
    """
    if not depends_on_length(model):
        return model
    twin = twin_of(model, only=list(rotary_modules(text_decoder(model))))
    own_frequencies(text_decoder(twin))
    return twin


def own_frequencies(twin: nn.Module) -> None:
    """Gives a twin frequencies of its own: some versions of transformers write new ones over the old."""
    for module in rotary_modules(twin):
        buffers = vars(module)["_buffers"]
        buffers.update({name: buffer if buffer is None else buffer.clone() for name, buffer in buffers.items()})


def pin(twin: nn.Module, decoder: nn.Module, length: int) -> None:
    """Makes a twin of a decoder turn all that it will read as a forward up to ``length`` tokens does.

    Raises:
        UnsupportedModelError: The embedding cannot be held at its frequencies.
    """
    for own, module in zip(rotary_modules(decoder), rotary_modules(twin), strict=True):
        if not _is_dependent(own, decoder):
            continue
        _turn(module, decoder, length)  # leaves it with these frequencies
        rope_type: Any = module.rope_type
        fixed: Any = dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"
        vars(module)["rope_type"] = fixed
        if _changes(module, decoder):
            raise UnsupportedModelError(
                f"expected a RoPE whose frequencies can be held, got {type(module).__name__} ({rope_type}), whose "
                "frequencies depend on the length in a way that is not understood"
            )


def rotary_modules(decoder: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules of a decoder that turn queries and keys."""
    return (module for module in decoder.modules() if "rope_type" in vars(module))  # hasattr is slow on modules


def _twin_of_rotary(module: nn.Module) -> nn.Module:
    twin: nn.Module = twin_of(module)
    own_frequencies(twin)
    return twin


def _is_dependent(module: nn.Module, decoder: nn.Module) -> bool:
    if module not in _DEPENDS:
        _DEPENDS[module] = _changes(_twin_of_rotary(module), decoder)
    return _DEPENDS[module]


def _changes(module: nn.Module, decoder: nn.Module) -> bool:
    """Whether a rotary module, which is asked and may change, turns a position differently for some length."""
    limit = max_positions(decoder) or 2**20
    config: Any = getattr(module, "config", None)
    original = getattr(config, "original_max_position_embeddings", None) or limit
    lengths = sorted(
        {2**power for power in range(1, 24) if 2**power <= 2 * limit} | {original, original + 1, limit + 1}
    )
    first = _turn(module, decoder, lengths[0])
    return any(not _same(first, _turn(module, decoder, length)) for length in lengths[1:])


def _turns(model: nn.Module, length: int) -> list[torch.Tensor]:
    """Returns how a forward that reads up to ``length`` tokens turns a position."""
    decoder = text_decoder(model)
    modules = [module for module in rotary_modules(decoder) if _is_dependent(module, decoder)]
    return [turn for module in modules for turn in _turn(_twin_of_rotary(module), decoder, length)]


@torch.no_grad()
def _turn(module: nn.Module, decoder: nn.Module, length: int) -> list[torch.Tensor]:
    """Returns cosine and sine of position 1 in a forward that reads up to ``length`` tokens, for each kind of layer."""
    device = next(iter(module.buffers()), torch.empty(0)).device
    positions = torch.tensor([[1, length - 1]], device=device)
    like = torch.empty(1, 1, 1, dtype=torch.float32, device=device)
    kinds: list[dict[str, Any]] = [{}]
    if "layer_type" in inspect.signature(type(module).forward).parameters:
        kinds = [{"layer_type": kind} for kind in dict.fromkeys(text_config(decoder).layer_types)]
    turns = []
    for kind in kinds:
        try:
            turned = module(like, positions, **kind)
        except (RuntimeError, IndexError, ValueError):  # M-RoPE: a position for each axis
            turned = module(like, positions.expand(3, 1, -1), **kind)
        turns += [part[..., 0, :] for part in turned]
    return turns


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _kind(model: nn.Module) -> str:
    decoder = text_decoder(model)
    return ", ".join(str(m.rope_type) for m in rotary_modules(decoder) if _is_dependent(m, decoder))
