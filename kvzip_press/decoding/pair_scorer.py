"""Scores all pairs of a cache anew at each eviction, by the pairs themselves and by the queries of the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kvzip_press.cache.pair_pool import STAYS, Worth
from kvzip_press.cache.query_window import QueryWindow
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.decoding.layer_pairs import LayerPairs, pairs_of
from kvzip_press.decoding.scorer import DecodeScorer, Layers, mark_staying
from kvzip_press.model.structure import full_attention_layers

NUMBERS_AT_ONCE = 2**24  # of the keys that are laid out together: bounds the memory that takes, whatever the batch


@dataclass(frozen=True)
class Look:
    """What a press looks at, and what it then thinks of pairs.

    Attributes:
        worth: Function ``LayerPairs -> [batch, num_key_value_heads, n]``, fp32 and finite at valid pairs, higher is
            kept. Pairs that stay carry it to the next eviction.
        n_queries: Number of last queries that it looks at. None for all since the last eviction, if it adds what they
            say to what pairs carry.
        at_values: Whether it looks at values.
    """

    worth: Callable[[LayerPairs], torch.Tensor]
    n_queries: int | None = 0
    at_values: bool = False

    @property
    def sees_queries(self) -> bool:
        """Whether it looks at queries at all."""
        return self.n_queries is None or self.n_queries > 0


class PairScorer(DecodeScorer):
    """Scores pairs when an eviction is due; nothing but queries is noted before, in the tails of the layers.

    So forks, crops and moved rows keep what it needs, and there is nothing to settle. A cache that was compressed by
    another press will do. Cache files keep no queries: a cache that was loaded has those of what it reads from then on.

    Args:
        model: The model.
        look: What is looked at.
    """

    def __init__(self, model: nn.Module, look: Look) -> None:
        self.look = look
        self._groups = {
            layer.layer_idx: int(getattr(layer.module, "num_key_value_groups", 1) or 1)
            for layer in full_attention_layers(model)
        }

    @property
    def holds_queries(self) -> bool:
        """Whether queries lie in the cache's tails until they are looked at."""
        return self.look.sees_queries

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watches nothing: the layers see their queries themselves."""
        yield

    def adopt(self, layers: Layers, *, stays: bool) -> None:
        """Prepares layers for evictions.

        Args:
            layers: The layers.
            stays: Whether pairs stay that the layers hold when they are met first.
        """
        for layer_idx, layer in layers.items():
            if layer.packed.scores is None:
                none = torch.zeros_like(layer.packed.positions, dtype=torch.float32)
                layer.packed = layer.packed.with_scores(none)
            if layer.tail.unscored != 0:
                layer.tail.begin_scores(unscored=0.0)
            window = layer.tail.window
            if not self.look.sees_queries:
                layer.tail.window = None
            elif window is None or window.size != self.look.n_queries:  # what another press kept is not enough, or old
                like = layer.blank_token[0][:, :1].expand(-1, layer.packed.num_heads * self._groups[layer_idx], -1, -1)
                layer.tail.window = QueryWindow.unknown(like, self.look.n_queries, layer.tail.length)
        if stays:
            mark_staying(layers)

    def worth(self, layers: Layers) -> Mapping[int, Worth]:
        """Returns what the pairs of all layers are worth now."""
        return {layer_idx: self._of_layer(layer_idx, layer) for layer_idx, layer in layers.items()}

    def _of_layer(self, layer_idx: int, layer: RaggedLayer) -> Worth:
        packed, tails = [], []
        n_pairs = int(layer.packed.seqlens.max()) + layer.tail.length
        a_row = layer.packed.num_heads * layer.packed.storage.head_dim * n_pairs
        n_rows = max(NUMBERS_AT_ONCE // max(a_row, 1), 1)
        for first in range(0, layer.batch_size, n_rows):
            pairs, back = pairs_of(layer_idx, layer, slice(first, first + n_rows), at_values=self.look.at_values)
            worth = self.look.worth(pairs)
            worth = torch.where(pairs.scores == STAYS, STAYS, worth)
            tails.append(worth.gather(2, back.clamp(min=0)))
            is_tail = torch.zeros_like(pairs.valid).scatter(2, back.clamp(min=0), back >= 0)
            packed.append(worth[pairs.valid & ~is_tail])
        return Worth(torch.cat(packed), torch.cat(tails))

    # What other scorers need ----------------------------------------------------------------------------------------

    def begin(self, layers: Layers, n_tokens: int) -> None:
        """Does nothing."""

    def read(self, layers: Layers, n_tokens: int, padding: torch.Tensor | None) -> None:
        """Does nothing: the layers have seen the queries."""

    def seen(self) -> None:
        """Does nothing."""

    def written(self, layers: Layers) -> None:
        """Does nothing."""

    def settle(self, layers: Layers) -> None:
        """Does nothing."""

    def cut_to(self, layers: Layers) -> None:
        """Does nothing."""

    def abandon(self) -> None:
        """Does nothing."""
