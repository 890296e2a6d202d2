"""Tells which caches, and which of their layers, can be compressed; and reads such a layer, dense or ragged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvzip_press import compat
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import UnsupportedCacheError
from kvzip_press.model.structure import AttentionLayer, full_attention_layers
from kvzip_press.sharing.layer import SharedLayer

if TYPE_CHECKING:
    from torch import nn


def compressible_layers(model: nn.Module, cache: Any) -> dict[int, AttentionLayer]:
    """Returns the layers of a cache that can be compressed, by layer index: the model's full-attention layers.

    Raises:
        UnsupportedModelError: The model has no full-attention layer, or has layers without keys and values.
        UnsupportedCacheError: The cache, or a layer of it, is of a kind that cannot be compressed; or its rows have
            read questions of different lengths since they were compressed.
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
    """Raises UnsupportedCacheError for a static, quantized or offloaded cache, and for anything that is not a cache."""
    if not isinstance(cache, compat.Cache) or not hasattr(cache, "layers"):
        raise UnsupportedCacheError(f"expected a DynamicCache, got {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise UnsupportedCacheError("expected a DynamicCache without offloading")
    supported = (compat.DynamicLayer, compat.DynamicSlidingWindowLayer, RaggedLayer, SharedLayer)
    for layer in cache.layers:
        if isinstance(layer, compat.CacheLayerMixin) and type(layer) not in supported:
            raise UnsupportedCacheError(
                f"expected a DynamicCache, got {type(cache).__name__} with layers of type {type(layer).__name__}"
            )


def check_not_evicted(cache: Any, start: int) -> None:
    """Raises UnsupportedCacheError if pairs of the span that begins at ``start`` have already been evicted."""
    for layer in cache.layers:
        if isinstance(layer, RaggedLayer) and layer.n_context > start:
            raise UnsupportedCacheError(
                f"expected the pairs of tokens {start} and on as the model left them, but this cache was already "
                f"evicted up to token {layer.n_context}: make further caches with Prefill.evict, which copies"
            )


def heads_and_device(layer: Any) -> tuple[int, torch.device]:
    """Returns the number of KV heads and the device of a dense or ragged cache layer."""
    if isinstance(layer, RaggedLayer):
        return layer.packed.num_heads, layer.packed.device
    return layer.keys.shape[1], layer.keys.device


def last_pairs(layer: Any, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values of the last ``n_tokens`` columns of a dense layer or of a ragged layer's tail, as views.

    Returns:
        ``[batch, num_heads, n_tokens, head_dim]`` and ``[batch, num_heads, n_tokens, v_head_dim]``.

    Raises:
        UnsupportedCacheError: The layer no longer holds them, because they were evicted.
    """
    dense = layer.tail if isinstance(layer, RaggedLayer) else layer
    keys, values = dense.keys, dense.values
    if keys is None or values is None or keys.shape[2] < n_tokens:
        held = 0 if keys is None else keys.shape[2]
        raise UnsupportedCacheError(
            f"expected the keys and values of {n_tokens} tokens as the model left them, got a layer with {held} such "
            "tokens: they were evicted already. Inside `with press(model):` a prefill is compressed when it ends; "
            "call compress and prefill outside of it"
        )
    first = keys.shape[2] - n_tokens
    # autocast leaves them in two dtypes where RoPE is computed in fp32; the wider one loses nothing
    return keys[:, :, first:], values[:, :, first:].to(keys.dtype)
