"""``with share_layers(model, ...):`` - some layers keep no keys and values, and read those of an earlier layer.

KVSharer (https://arxiv.org/abs/2410.18517). The projections of such a layer are not computed, and its place in a cache
holds nothing: a hook on the decoder lets it read the layer that it shares with, dense or compressed, in each forward.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from kvzip_press import compat
from kvzip_press.arguments.model import check_model
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.model.devices import execution_device
from kvzip_press.model.identity import check_facts
from kvzip_press.model.structure import (
    AttentionLayer,
    attention_layers,
    check_keeps_cache,
    full_attention_layers,
    text_decoder,
)
from kvzip_press.sharing.file import read_sources
from kvzip_press.sharing.layer import bind_shared_layers, place_shared_layers, release_shared_layers
from kvzip_press.sharing.projection import SharedProjection

_PROJECTIONS = ("k_proj", "v_proj")


@contextmanager
def share_layers(model: nn.Module, sources: str | Path | Mapping[int, int]) -> Iterator[None]:
    """Lets some layers of a model read the keys and values of others while this is open (KVSharer).

    The layers that read others compute no keys and values and take no memory in a cache. Whatever fills or reads a
    cache inside works as usual, presses included: they score and evict the pairs of the other layers, by these layers'
    own queries. A cache made inside can be used inside such a context only, and a cache made outside only outside;
    anything else raises an error.

    The model itself is changed, for every thread. Do not save, move or train it inside.

    Args:
        model: A causal language model.
        sources: The file that ``kvzip-press layers share`` wrote; or the index of each layer that reads another -> the
            index of that other, which is an earlier layer that keeps its own.

    Raises:
        InvalidArgumentError: The file cannot be read or is of another model, or the layers are not such.
        UnsupportedModelError: Layers of the model share already, some use a sliding window, or the projections to keys
            and values cannot be left out: they are fused with that to queries, or have other widths. Or a layer lies
            on another device than the one that it reads.
    """
    check_model(model, "share_layers(model, ...)")
    if not isinstance(sources, str | Path | Mapping):
        raise InvalidArgumentError(
            f"expected a file of shared layers, or a mapping such as {{5: 3}}, got {type(sources).__name__}"
        )
    chosen, facts = ({}, {}) if isinstance(sources, Mapping) else read_sources(Path(sources))
    if isinstance(sources, Mapping):
        chosen = dict(sources)
    layers = shareable_layers(model)
    _check_sources(chosen, layers)
    if facts:
        check_facts(facts, model, "shared layers", f"share_layers(model, {reprlib.repr(chosen)})")
    modules = {layer.layer_idx: layer.module for layer in layers}
    for layer_idx, source in chosen.items():
        if _widths(modules[layer_idx]) != _widths(modules[source]):
            raise UnsupportedModelError(
                f"expected layers of one shape to share, got layer {layer_idx} with keys and values of "
                f"{_widths(modules[layer_idx])} numbers and layer {source} with {_widths(modules[source])}"
            )
        devices = execution_device(modules[layer_idx]), execution_device(modules[source])
        if devices[0] != devices[1]:
            raise UnsupportedModelError(
                f"expected layers that share on one device, got layer {layer_idx} on {devices[0]} and layer {source} "
                f"on {devices[1]}"
            )
    decoder = text_decoder(model)
    with ExitStack() as stack:
        for layer_idx, source in chosen.items():
            for name in _PROJECTIONS:
                stack.enter_context(_replaced(modules[layer_idx], name, source))
        hook = decoder.register_forward_pre_hook(_before(chosen), with_kwargs=True)
        stack.callback(hook.remove)
        hook = decoder.register_forward_hook(_after, with_kwargs=True, always_call=True)
        stack.callback(hook.remove)
        yield


def shareable_layers(model: nn.Module) -> list[AttentionLayer]:
    """Returns a model's attention layers, if each can read another's keys and values.

    Raises:
        UnsupportedModelError: See :func:`share_layers`.
    """
    name = type(model).__name__
    full_attention_layers(model)  # refuses layers of other kinds
    layers = attention_layers(model)
    if sharing := [layer.layer_idx for layer in layers if layer.shares_with is not None]:
        raise UnsupportedModelError(
            f"expected a model whose layers have keys and values of their own, got {name}, whose layers {sharing} read "
            "those of others already: leave that context first"
        )
    if windows := [layer.layer_idx for layer in layers if not layer.is_full]:
        raise UnsupportedModelError(
            f"expected a model whose layers all see the whole context, so that any can read another's pairs, got {name}"
            f", whose layers {windows} use a sliding window"
        )
    for layer in layers:
        missing = [one for one in _PROJECTIONS if not hasattr(getattr(layer.module, one, None), "out_features")]
        if missing:
            raise UnsupportedModelError(
                f"expected projections k_proj and v_proj, which can be left out, in every layer, got {name}, whose "
                f"layer {layer.layer_idx} has no {' and no '.join(missing)}: fused with that to queries?"
            )
    return layers


def _check_sources(sources: Mapping[Any, Any], layers: list[AttentionLayer]) -> None:
    known = [layer.layer_idx for layer in layers]
    ours = sources and all(
        type(i) is int and type(j) is int and i in known and j in known and j < i and j not in sources
        for i, j in sources.items()
    )
    if not ours:
        raise InvalidArgumentError(
            f"expected a mapping of layers, out of {reprlib.repr(known)}, to earlier ones that keep their own keys and "
            f"values, got {reprlib.repr(dict(sources))}"
        )


def _widths(module: Any) -> tuple[int, int]:
    return int(module.k_proj.out_features), int(module.v_proj.out_features)


@contextmanager
def _replaced(module: nn.Module, name: str, source: int) -> Iterator[None]:
    projection: Any = getattr(module, name)
    setattr(module, name, SharedProjection(int(projection.out_features), source))
    try:
        yield
    finally:
        setattr(module, name, projection)


def _before(sources: Mapping[int, int]) -> Any:
    """Returns the hook that lets shared layers read their cache's other layers in a forward of the decoder."""

    def bind(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        check_keeps_cache(decoder)
        named = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        cache = compat.cache_given(named)
        if cache is None:  # also with use_cache=False: layers read each other's keys and values through one
            config: Any = decoder.config
            cache = (compat.DynamicCache if _keeps(named, decoder) else _PassingCache)(config=config)
            named |= compat.cache_argument(decoder, cache)
        place_shared_layers(cache, sources)
        bind_shared_layers(cache)
        return (), named

    return bind


class _PassingCache(compat.DynamicCache):
    """The cache of one forward that was to have none."""


def _keeps(named: Mapping[str, Any], decoder: Any) -> bool:
    """Whether a forward shall return the cache that it fills."""
    use_cache = named.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache)


def _after(_decoder: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Lets go of the layers that were read, also after a forward that raised, and of a cache that nobody asked for."""
    cache = compat.cache_given(kwargs)
    release_shared_layers(cache)
    if not isinstance(cache, _PassingCache) or output is None:
        return None
    if isinstance(output, tuple):
        return tuple(one for one in output if one is not cache)
    return type(output)(**{name: one for name, one in output.items() if one is not cache})
