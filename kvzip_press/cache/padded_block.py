"""Reads rows of different lengths into a cache: layers that stand in during one forward over a left-padded block.

Each row's earlier tokens move over the padding of its block, so that the rows of the cache are always padded on the
left only: sliding windows count the columns between two tokens, and every later forward needs no more than one number
per row. If nothing was read since the context, as for a first question, ragged layers have nothing to move.
"""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.cache.padding import ends_dropped, moved_over_padding
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import UnsupportedCacheError
from kvzip_press.sharing.layer import SharedLayer


class BlockLayer(compat.CacheLayerMixin):
    """Stands in for a layer of the cache while a block is read; what is read stays in that layer.

    Args:
        layer: A ragged or a sliding layer.
        padding: int64 ``[batch]``, columns of padding on the left of the block.
    """

    is_initialized = True  # Gemma 3 with images asks

    def __init__(self, layer: Any, padding: torch.Tensor) -> None:
        self.layer, self.padding = layer, padding
        self.is_sliding = not isinstance(layer, RaggedLayer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds ``[batch, num_heads, n, head_dim]`` to the layer, and returns what attention is to see."""
        if isinstance(self.layer, RaggedLayer):
            return self.layer.append(key_states, value_states, self.padding)
        seen = self.layer.update(key_states, value_states)
        n_before = seen[0].shape[2] - key_states.shape[2]
        keys, values = (moved_over_padding(tokens, n_before, self.padding) for tokens in seen)
        first = 1 - self.layer.sliding_window
        self.layer.keys, self.layer.values = keys[:, :, first:], values[:, :, first:]
        return keys, values

    def attend_for_another(self, query: torch.Tensor, attention_mask: Any, **options: Any) -> torch.Tensor:
        """Returns what the layer, a ragged one, returns to another that shares its pairs."""
        output: torch.Tensor = self.layer.attend_for_another(query, attention_mask, **options)
        return output

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is nothing to initialise."""

    def get_mask_sizes(self, cache_position: Any) -> tuple[int, int]:
        """Returns the layer's own mask sizes."""
        sizes: tuple[int, int] = self.layer.get_mask_sizes(cache_position)
        return sizes

    def get_seq_length(self) -> int:
        """Returns the layer's own length."""
        return int(self.layer.get_seq_length())

    def get_max_cache_shape(self) -> int:
        """Returns the layer's own maximum."""
        return int(self.layer.get_max_cache_shape())

    get_max_length = get_max_cache_shape


def block_cache(cache: Any, padding: torch.Tensor) -> Any:
    """Returns a cache for one forward that reads a block into ``cache``.

    Args:
        cache: A compressed cache.
        padding: int64 ``[batch]``, columns of padding on the left of the block.

    Raises:
        UnsupportedCacheError: No layer is ragged, or a layer is neither ragged nor sliding, nor reads another.
    """
    kinds = {type(layer) for layer in cache.layers}
    if RaggedLayer not in kinds or kinds - {RaggedLayer, SharedLayer, compat.DynamicSlidingWindowLayer}:
        names = sorted(kind.__name__ for kind in kinds)
        raise UnsupportedCacheError(
            f"expected a compressed cache for rows of different length, got layers {names}: transformers' own generate "
            "takes padded rows with other caches"
        )
    return compat.Cache(
        layers=[layer if isinstance(layer, SharedLayer) else BlockLayer(layer, padding) for layer in cache.layers]
    )


def drop_ends_of_sliding(layer: Any, counts: torch.Tensor, *, n_columns: int) -> None:
    """Drops the last ``counts`` ``[batch]`` tokens of each row of a sliding layer that still holds all of them.

    Args:
        layer: The layer. If no token is dropped, it may have lost its first ones already.
        counts: int64 ``[batch]``, number of tokens to drop from each row.
        n_columns: Number of columns seen that remain; columns that are padding in every row are dropped, too.
    """
    held = min(n_columns, layer.keys.shape[2])
    layer.keys, layer.values = (ends_dropped(tokens, counts, held) for tokens in (layer.keys, layer.values))
    layer.cumulative_length = n_columns
