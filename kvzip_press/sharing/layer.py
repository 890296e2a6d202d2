"""The cache layer of a decoder layer that reads another's keys and values: it holds nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import CacheView
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError


class ReadByOthers(Protocol):
    """A cache layer that computes attention over its own storage, also for other layers than its own."""

    def attend_for_another(
        self, query: torch.Tensor, attention_mask: Any, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """Returns what a layer of ours returns for its own queries, once it has attended to them in this forward."""


class SharedLayer(compat.CacheLayerMixin):
    """Stands in a cache where a layer has no keys and values of its own.

    Only during a forward of a model inside :func:`kvzip_press.share_layers` does it know the layer that it reads:
    between forwards it refers to nothing, so that layers can be replaced, and nothing is kept alive by it.

    Args:
        shares_with: Index of the layer that it reads, an earlier one.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(self, shares_with: int) -> None:
        self.keys = self.values = None
        self.shares_with = shares_with
        self._read: Any = None  # the layer, during a forward

    def bind(self, layer: Any) -> None:
        """Reads ``layer`` in the forward that begins; None when it has ended."""
        self._read = layer

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is nothing to initialise."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drops what it is given, and returns the keys and values of the layer that it reads, with the newest tokens.

        Raises:
            CacheMismatchError: The model does not share layers now, so that it would attend to nothing.
        """
        read = self._known()
        if type(read) is compat.DynamicLayer:
            assert read.keys is not None and read.values is not None
            return read.keys, read.values
        return CacheView.of(self, key_states), CacheView.of(self, value_states)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attends to the pairs of the layer that it reads, in that layer's own way."""
        read: ReadByOthers = self._known()
        return read.attend_for_another(query, attention_mask, scaling=scaling, softcap=softcap)

    def get_mask_sizes(self, cache_position: int | torch.Tensor) -> tuple[int, int]:
        """Returns those of the layer that it reads."""
        sizes: tuple[int, int] = self._known().get_mask_sizes(cache_position)
        return sizes

    def get_seq_length(self) -> int:
        """Returns that of the layer that it reads."""
        return int(self._known().get_seq_length())

    def get_max_cache_shape(self) -> int:
        """Returns -1: there is no maximum."""
        return -1

    get_max_length = get_max_cache_shape

    def _known(self) -> Any:
        if self._read is None:
            raise CacheMismatchError(
                f"this cache was made inside `with share_layers(model, ...):`, and holds nothing of a layer that reads "
                f"layer {self.shares_with}: use it inside such a context with the same layers"
            )
        return self._read

    def _follow(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: whatever is done to rows and tokens is done to the layer that it reads."""

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = reset = offload = prefetch = _follow


def holding(layers: Iterable[Any]) -> list[Any]:
    """Returns the layers that hold keys and values of their own, in order."""
    return [layer for layer in layers if not isinstance(layer, SharedLayer)]


def sources_in(layers: Iterable[Any]) -> dict[int, int]:
    """Returns which layers of a cache read which: the index of each shared one -> that of the layer that it reads."""
    return {index: layer.shares_with for index, layer in enumerate(layers) if isinstance(layer, SharedLayer)}


def place_shared_layers(cache: Any, sources: Mapping[int, int]) -> None:
    """Puts shared layers into a cache that is still empty there; one that has them already must have the same.

    Args:
        cache: A DynamicCache, or one whose layers are of this package.
        sources: Index of each layer that reads another -> index of that other.

    Raises:
        CacheMismatchError: The cache was filled without sharing, or with other layers that share.
        UnsupportedCacheError: It is of a kind that cannot leave a layer out.
    """
    layers: Any = getattr(cache, "layers", None)
    if not isinstance(cache, compat.Cache) or not isinstance(layers, list) or getattr(cache, "offloading", False):
        raise UnsupportedCacheError(
            f"expected a DynamicCache without offloading inside share_layers(...), got {type(cache).__name__}"
        )
    there = sources_in(layers)
    if there == dict(sources):
        return
    kinds = {type(layer) for layer in layers}
    if kinds - {compat.DynamicLayer, SharedLayer}:
        if all(kind.__module__.startswith("kvzip_press") for kind in kinds) or there:
            raise _filled_otherwise(there, sources)
        names = sorted(kind.__name__ for kind in kinds)
        raise UnsupportedCacheError(f"expected a DynamicCache inside share_layers(...), got layers {names}")
    if there or any(layer.get_seq_length() for layer in layers):
        raise _filled_otherwise(there, sources)
    while len(layers) <= max(sources):
        layers.append(compat.DynamicLayer())  # of a DynamicCache that grows its layers as they are filled
    for index, source in sources.items():
        layers[index] = SharedLayer(source)


def _filled_otherwise(there: Mapping[int, int], sources: Mapping[int, int]) -> CacheMismatchError:
    return CacheMismatchError(
        f"expected a cache that was filled inside share_layers(model, {dict(sources)}), got one that was filled "
        f"{f'with {dict(there)}' if there else 'without sharing'}"
    )


def bind_shared_layers(cache: Any) -> None:
    """Lets the shared layers of a cache read its other layers, in the forward that begins."""
    for layer in cache.layers:
        if isinstance(layer, SharedLayer):
            layer.bind(cache.layers[layer.shares_with])


def release_shared_layers(cache: Any) -> None:
    """Lets the shared layers of a cache, or of None, forget what they read, since the forward has ended."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, SharedLayer):
            layer.bind(None)
