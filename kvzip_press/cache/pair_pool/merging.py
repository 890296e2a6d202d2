"""What becomes of the layers of a pool when pairs of them go: their packed pairs and their tails become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.pair_pool.pair_list import PerPair
from kvzip_press.cache.pair_pool.stack import LayerStack, parts_of
from kvzip_press.cache.ragged_layer import RaggedLayer

NUMBERS_MERGED = 2**29  # of the keys and values that are merged together: 1 GB in 16 bits


@dataclass(frozen=True)
class Merges:
    """The pairs of each layer that stay, and those of its tail that do.

    Attributes:
        layers: The layers, as they are before the eviction.
        positions: int32 ``[batch, n]``, of the tails' columns.
        keep: Bool ``[layers, batch, heads, n]``, which pairs of the tails stay.
        scores: fp32 ``[layers, batch, heads, n]``, what these carry from now on.
        importance: fp32, in the same shape: see :class:`~kvzip_press.cache.codecs.held.NewPairs`.
        staying: Bool ``[total_kept]`` of each layer, which of its packed pairs stay.
        carried: fp32 ``[total_kept]`` of each layer, what these carry from now on.
        lengths: How many pairs each segment has after the eviction, int64 ``[layers * batch * heads]`` on the host.
    """

    layers: Sequence[RaggedLayer]
    positions: torch.Tensor
    keep: torch.Tensor
    scores: torch.Tensor
    importance: torch.Tensor
    staying: tuple[torch.Tensor, ...]
    carried: tuple[torch.Tensor, ...]
    lengths: torch.Tensor

    @classmethod
    def of(
        cls,
        layers: Sequence[RaggedLayer],
        positions: torch.Tensor,
        *,
        kept: PerPair,
        carried: PerPair,
        importance: torch.Tensor,
        lengths: torch.Tensor,
    ) -> Merges:
        """Returns the merges of layers, given numbers of all their pairs; ``importance`` is that of the tails'."""
        sizes = [layer.packed.total for layer in layers]
        keep, scores, importance = (
            each.unflatten(0, (len(layers), -1)) for each in (kept.tails, carried.tails, importance)
        )
        staying, of_packed = kept.packed.split(sizes), carried.packed.split(sizes)
        return cls(layers, positions, keep, scores, importance, staying, of_packed, lengths)

    def parts(self) -> list[slice]:
        """Returns the layers in parts that are merged together: as many as take little memory beside the pool."""
        packed = self.layers[0].packed
        width = packed.storage.head_dim + packed.storage.v_head_dim
        pairs = (layer.packed.total + self.keep[0].numel() for layer in self.layers)
        return parts_of([n * width for n in pairs], NUMBERS_MERGED)

    def of_layers(self, part: slice) -> PackedPairs:
        """Returns the pairs of some layers after the eviction."""
        stack = LayerStack.of(self.layers, part)
        assert stack.keys is not None and stack.values is not None
        keep, scores, importance = (each[part].flatten(0, 1) for each in (self.keep, self.scores, self.importance))
        return stack.packed.with_scores(torch.cat(self.carried[part])).merge(
            stack.keys,
            stack.values,
            self.positions.repeat(len(stack.layers), 1),
            keep,
            torch.cat(self.staying[part]),
            scores,
            importance=importance,
            total=int(self.lengths.view(len(self.layers), -1)[part].sum()),
        )

    def of_all(self) -> PackedPairs:
        """Returns the pairs of all layers after the eviction, made part by part."""
        return PackedPairs.joined(map(self.of_layers, self.parts()), int(self.lengths.sum()), self.layers[0].packed)
