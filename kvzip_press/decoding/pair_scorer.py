"""Scores all pairs of a cache anew at each eviction, by the pairs themselves and by the queries of the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kvzip_press.cache.pair_pool.stack import LayerStack, bounds_of, parts_of
from kvzip_press.cache.pair_pool.worth import STAYS, Worth
from kvzip_press.cache.query_window import QueryWindow
from kvzip_press.decoding.layer_pairs import LayerPairs, pairs_of
from kvzip_press.decoding.scorer import DecodeScorer, Layers, mark_staying
from kvzip_press.model.structure import full_attention_layers

NUMBERS_AT_ONCE = 2**28  # of the keys that are laid out together: 512 MB in 16 bits, whatever the batch


@dataclass(frozen=True)
class Look:
    """What a press looks at, and what it then thinks of pairs.

    Attributes:
        worth: Function ``LayerPairs -> [batch, num_key_value_heads, n]``, fp32 and finite at valid pairs, higher is
            kept. Pairs that stay carry it to the next eviction.
        n_queries: Number of last queries that it looks at. None for all since the last eviction, if it adds what they
            say to what pairs carry.
        at_values: Whether it looks at values.
        by_layer: Whether it is given the rows of one layer at a time. Rows of several layers at once take fewer
            kernels: of a batch of one row, most of an eviction's time is their launches.
    """

    worth: Callable[[LayerPairs], torch.Tensor]
    n_queries: int | None = 0
    at_values: bool = False
    by_layer: bool = True

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
        found: dict[int, Worth] = {}
        every = list(layers.values())
        batch, storage = every[0].batch_size, every[0].packed.storage
        n_pairs = int(bounds_of(every).diff().max()) + every[0].tail.length
        a_row = every[0].packed.num_heads * storage.head_dim * n_pairs
        most = NUMBERS_AT_ONCE if self._may_be_stacked(layers) else 0
        n_rows = max(NUMBERS_AT_ONCE // max(a_row, 1), 1)
        for part in parts_of([a_row * batch] * len(every), most):
            indices, stack = list(layers)[part], LayerStack.of(every, part)
            rows = [slice(None)] if len(indices) > 1 else [slice(i, i + n_rows) for i in range(0, batch, n_rows)]
            packed, tails = zip(*(self._of_rows(indices, stack, some) for some in rows), strict=True)
            sizes = [layer.packed.total for layer in stack.layers]
            of_layers = torch.cat(packed).split(sizes), torch.cat(tails).split(batch)
            found |= {i: Worth(*both) for i, *both in zip(indices, *of_layers, strict=True)}
        return found

    def _may_be_stacked(self, layers: Layers) -> bool:
        """Whether rows of several layers can be looked at as if they were of one."""
        kinds = {(layer.logits, self._groups[layer_idx]) for layer_idx, layer in layers.items()}
        return not self.look.by_layer and len(kinds) == 1

    def _of_rows(self, indices: Sequence[int], stack: LayerStack, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what pairs of some rows are worth: the packed ones, and those of the tails."""
        pairs, front, back = pairs_of(indices, stack, rows, at_values=self.look.at_values)
        worth = self.look.worth(pairs)
        worth = torch.where(pairs.scores == STAYS, STAYS, worth)
        return worth.flatten()[front], worth.gather(2, back.clamp(min=0))

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
