"""All pairs of a pool in one list, packed ones and those of tails, so that they can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.pair_pool.tails import Tails

MOST_POSITIONS = 2**22  # with a number each; if positions began later, only those that are held have one


@dataclass(frozen=True)
class PerPair:
    """One number of each pair.

    Attributes:
        packed: ``[total_kept]``, of the packed pairs, layer by layer.
        tails: ``[layers * batch, heads, n]``, of those of the tails; anything at padding.
    """

    packed: torch.Tensor
    tails: torch.Tensor

    def listed(self) -> torch.Tensor:
        """Returns them in one list, ``[pairs]``, in the order of a :class:`PairList`."""
        return torch.cat([self.packed, self.tails.flatten()])

    def like(self, listed: torch.Tensor) -> PerPair:
        """Returns other numbers of the same pairs, given in one list."""
        n_packed = len(self.packed)
        return PerPair(listed[:n_packed], listed[n_packed:].view_as(self.tails))


@dataclass(frozen=True)
class PairList:
    """Pairs in one list, however they are stored.

    Attributes:
        segment: int64 ``[pairs]``, the (layer, row, head) that each belongs to.
        position: int32 ``[pairs]``.
        score: fp32 ``[pairs]``.
        alive: Bool ``[pairs]``, False at padding.
        shape: Number of layers, rows and heads.
        indices: The layers' indices in the model, which an allocation may look at.
        span: A number above all positions; None if the host knows none.
    """

    segment: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor
    alive: torch.Tensor
    shape: tuple[int, int, int]
    indices: tuple[int, ...]
    span: int | None = None

    @classmethod
    def of(cls, packed: PackedPairs, tails: Tails, scores: PerPair, indices: tuple[int, ...], span: int) -> PairList:
        """Returns the packed pairs and, after them, the columns of all tails.

        Args:
            packed: The packed pairs of all layers; keys and values are not needed.
            tails: The tails of all layers.
            scores: What the pairs are compared by.
            indices: The layers' indices in the model.
            span: A number above all positions.
        """
        n_rows, n_heads, n_columns = tails.scores.shape
        segments = torch.arange(n_rows * n_heads, device=packed.device)
        own = segments.repeat_interleave(packed.cu_seqlens.diff().long(), output_size=packed.total)
        are_pairs = torch.ones_like(packed.positions, dtype=torch.bool)
        return cls(
            segment=torch.cat([own, segments.unsqueeze(1).expand(-1, n_columns).flatten()]),
            position=PerPair(packed.positions, tails.of_heads(tails.positions)).listed(),
            score=scores.listed(),
            alive=PerPair(are_pairs, tails.of_heads(tails.valid)).listed(),
            shape=(len(indices), len(tails.ends), n_heads),
            indices=indices,
            span=span,
        )

    @property
    def n_numbers(self) -> int:
        """How many numbers positions have at most, as far as the host knows: 1 if it knows nothing of them."""
        return min(self.span or 1, MOST_POSITIONS)

    def numbered(self) -> tuple[torch.Tensor, int]:
        """Returns a number for the position of each pair, in their order, and one that is above all."""
        if self.span is not None and self.span <= MOST_POSITIONS:
            return self.position.long(), self.span
        known, where = self.position.long().unique(return_inverse=True)  # waits for the device, and sorts
        return where, len(known)
