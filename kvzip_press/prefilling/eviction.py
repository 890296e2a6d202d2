"""Building the layers of a compressed cache from keep masks, one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press import compat
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.sliding_windows import own_window
from kvzip_press.errors import UnsupportedCacheError
from kvzip_press.model.structure import AttentionLayer, attention_layers, full_attention_layers

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.prefilling.whole import Prefill


def compressible_layers(model: nn.Module, cache: Any) -> dict[int, AttentionLayer]:
    """The layers of a cache that can be compressed, by index: the model's full-attention layers.

    Raises:
        UnsupportedModelError: The model has none.
        UnsupportedCacheError: A cache, or a layer of it, of a kind that cannot be compressed; or rows that have read
            questions of different length since they were compressed.
    """
    layers = {layer.layer_idx: layer for layer in full_attention_layers(model)}
    check_cache(cache)
    for layer_idx in layers:
        kind = type(cache.layers[layer_idx]) if layer_idx < len(cache.layers) else None
        if kind not in (compat.DynamicLayer, compat.DynamicSlidingWindowLayer, RaggedLayer):
            name = "nothing" if kind is None else kind.__name__
            raise UnsupportedCacheError(f"expected a DynamicCache, but layer {layer_idx} holds {name}")
        if kind is RaggedLayer and cache.layers[layer_idx].tail.padding is not None:
            raise UnsupportedCacheError(
                "expected rows that have read equally many tokens since they were compressed, to compress a later "
                f"turn, but the tails of layer {layer_idx} begin with padding: "
                f"{cache.layers[layer_idx].tail.padding.tolist()}"
            )
    return layers


def check_cache(cache: Any) -> None:
    """Raises UnsupportedCacheError for caches that cannot be compressed (static, quantized, offloaded, none)."""
    if not isinstance(cache, compat.Cache) or not hasattr(cache, "layers"):
        raise UnsupportedCacheError(f"expected a DynamicCache, got {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise UnsupportedCacheError("expected a DynamicCache without offloading")
    supported = (compat.DynamicLayer, compat.DynamicSlidingWindowLayer, RaggedLayer)
    for layer in cache.layers:
        if isinstance(layer, compat.CacheLayerMixin) and type(layer) not in supported:
            raise UnsupportedCacheError(
                f"expected a DynamicCache, got {type(cache).__name__} with layers of type {type(layer).__name__}"
            )


def check_not_evicted(cache: Any, start: int) -> None:
    """Raises UnsupportedCacheError when pairs of the span that begins at ``start`` are gone already."""
    for layer in cache.layers:
        if isinstance(layer, RaggedLayer) and layer.n_context > start:
            raise UnsupportedCacheError(
                f"expected the pairs of tokens {start} and on as the model left them, but this cache was already "
                f"evicted up to token {layer.n_context}: make further caches with Prefill.evict, which copies"
            )


def heads_and_device(layer: Any) -> tuple[int, torch.device]:
    """KV heads and device of a dense or ragged cache layer."""
    if isinstance(layer, RaggedLayer):
        return layer.packed.num_heads, layer.packed.keys.device
    return layer.keys.shape[1], layer.keys.device


def evicted_layers(
    prefill: Prefill,
    keep: Mapping[int, torch.Tensor],
    protected: torch.Tensor,
    *,
    earlier: Mapping[int, torch.Tensor] | None = None,
    scores: Mapping[int, torch.Tensor] | None = None,
) -> Iterator[tuple[int, Any]]:
    """The layers of the compressed cache in order, each built when it is asked for.

    Args:
        prefill: The span and its cache, which is only read.
        keep: ``layer_idx -> [batch, num_heads, span]``, bool.
        protected: ``[batch, span]``, bool.
        earlier: ``layer_idx -> [total]``, bool: which packed pairs of earlier spans stay; None for all of them.
        scores: ``layer_idx -> [batch, num_heads, span]``, fp32, that the pairs of a first span carry; None for none.
    """
    by_idx = {layer.layer_idx: layer for layer in attention_layers(prefill.model)}
    lost = (prefill.valid & ~protected).cumsum(dim=-1) > 0  # from the first token on that a head may lose
    counts = tuple((prefill.valid & ~lost).sum(dim=-1).tolist())
    n_padding = tuple((~prefill.valid).sum(dim=-1).masked_fill(~prefill.valid[:, -1], -1).tolist())
    ends = tuple((prefill.positions.masked_fill(~prefill.valid, -1).amax(dim=-1) + 1).tolist())
    for layer_idx in range(len(prefill.cache.layers)):
        layer = prefill.cache.layers[layer_idx]
        if layer_idx not in keep:
            yield layer_idx, sliding_copy(layer, by_idx.get(layer_idx))
        elif isinstance(layer, RaggedLayer):
            kept = None if earlier is None else earlier[layer_idx]
            yield layer_idx, _merged(layer, prefill, keep[layer_idx], kept, counts, ends, by_idx[layer_idx])
        else:
            positions = prefill.positions.to(layer.keys.device)
            carried = None if scores is None else scores[layer_idx]
            packed = PackedPairs.pack(layer.keys, layer.values, keep[layer_idx], positions, carried)
            yield (
                layer_idx,
                RaggedLayer(
                    packed,
                    n_context=keep[layer_idx].shape[-1],
                    n_protected=counts,
                    n_padding=n_padding,
                    context_ends=ends,
                    module=by_idx[layer_idx].module,
                ),
            )


def _merged(
    layer: RaggedLayer,
    prefill: Prefill,
    keep: torch.Tensor,
    kept: torch.Tensor | None,
    counts: tuple[int, ...],
    ends: tuple[int, ...],
    attention: AttentionLayer,
) -> RaggedLayer:
    """A later span: the ``kept`` of what was packed stay; the span's survivors and the tail before it are added."""
    keys, values = layer.tail.keys, layer.tail.values
    assert keys is not None and values is not None
    earlier = keys.shape[2] - keep.shape[2]
    batch, heads, _ = keep.shape
    before = torch.arange(-earlier, 0, device=keys.device)
    positions = prefill.positions.to(keys.device)
    positions = torch.cat([positions[:, :1] + before, positions], dim=1).int()
    keep = torch.cat([keep.new_ones(batch, heads, earlier), keep], dim=2)
    rows = range(batch) if layer.row_index is None else layer.row_index.tolist()
    packed = layer.packed if layer.row_index is None else layer.packed.select_rows(rows)
    n_protected = tuple(layer.n_protected[row] or counts[i] for i, row in enumerate(rows))
    whole = prefill.valid.all(dim=-1).tolist()  # padding in a later span is a hole in what sliding layers hold
    n_padding = tuple(layer.n_padding[row] if whole[i] else -1 for i, row in enumerate(rows))
    return RaggedLayer(
        packed.merge(keys, values, positions, keep, kept),
        n_context=layer.get_seq_length(),
        n_protected=n_protected if layer.n_context else counts,
        n_padding=n_padding,
        context_ends=ends,
        module=attention.module,
    )


def sliding_copy(layer: Any, attention: AttentionLayer | None) -> Any:
    """A layer that stays dense, as an object of its own: its tensors are replaced on update, never written into.

    A sliding layer in a cache made without the model's config holds every token; only the last window - 1 can still be
    seen, and its mask would not fit a cache with ragged layers, so it becomes a proper sliding layer.
    """
    if attention is None or attention.sliding_window is None or type(layer) is not compat.DynamicLayer:
        sliding = copy.copy(layer)
    else:
        assert layer.keys is not None and layer.values is not None
        sliding = compat.DynamicSlidingWindowLayer(sliding_window=attention.sliding_window)
        sliding.update(layer.keys, layer.values)
    own_window(sliding)
    return sliding
