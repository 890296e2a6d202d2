"""Groups the tokens that a model has written since the last time, so that steps go on reading a part of the cache."""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press.cache.all_layers import all_or_nothing
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.recall.recalled_pairs import RecalledPairs


def tokens_to_grouping(cache: Any) -> int | None:
    """Returns how many tokens can be read until new ones are grouped, 0 if they should be now; None for never.

    Never are those of a cache that recalls nothing, of rows that share a context (each would need a copy of it), and of
    rows of different length, whose new tokens lie behind padding: they are attended whole.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, RaggedLayer)]
    batches = [layer.packed.recall.batch for layer in layers if isinstance(layer.packed, RecalledPairs)]
    if (
        not batches
        or not min(batches)
        or any(one.row_index is not None or one.tail.padding is not None for one in layers)
    ):
        return None
    return max(min(batches) - layers[0].tail.length, 0)


def group_if_due(cache: Any) -> bool:
    """Makes new tokens part of the context of each compressed layer, in groups of their own, if enough are there.

    All layers then hold what they held, in the same precision. Like the context, these tokens cannot be forgotten by
    ``truncate`` afterwards.

    Returns:
        Whether it did.
    """
    if tokens_to_grouping(cache) != 0:
        return False
    with all_or_nothing(cache):
        for layer in cache.layers:
            if isinstance(layer, RaggedLayer):
                _take_tail(layer)
    return True


def _take_tail(layer: RaggedLayer) -> None:
    keys, values = layer.tail.keys, layer.tail.values
    assert keys is not None and values is not None
    first = layer.next_positions[:, None] - layer.tail.length
    positions = (first + torch.arange(layer.tail.length, device=first.device)).int()
    keep = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    layer.take(layer.packed.merge(keys, values, positions, keep, scores=layer.tail.scores))
