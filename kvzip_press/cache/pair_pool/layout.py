"""Pairs of some rows, laid out like the scores of a span."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvzip_press.cache.pair_pool.pair_list import PairList


@dataclass(frozen=True)
class Layout:
    """Where pairs of some rows lie, if each row has a column for every position that any of its heads holds.

    Attributes:
        place: int64 ``[pairs]``, of each pair of a list in the flattened layout. Pairs of other rows, and padding, are
            in one place behind all others, which is not looked at.
        shape: Number of layers, rows, heads and columns.
        valid: Bool ``[rows, columns]``, which columns a row has: the first ones.
        positions: int64 ``[rows, columns]``, ascending; 0 in columns that a row does not have.
        is_finite: Whether the scores of these rows' pairs are.
    """

    place: torch.Tensor
    shape: tuple[int, int, int, int]
    valid: torch.Tensor
    positions: torch.Tensor
    is_finite: bool

    @classmethod
    def of(cls, pairs: PairList, rows: torch.Tensor) -> Layout:
        """Returns where pairs lie; waits for the device once.

        Args:
            pairs: Pairs of these rows and of others.
            rows: int64 ``[n]``, the rows to lay out.
        """
        slots = _slots(pairs, rows)
        slot = slots[pairs.segment].where(pairs.alive, len(rows))
        is_in = slot < len(rows)
        column, counts = _columns(pairs, slot, len(rows))
        are_finite = (pairs.score.isfinite() | ~is_in).all()
        n_columns, is_finite = torch.stack([counts.max(), are_finite]).tolist()
        shape = (pairs.shape[0], len(rows), pairs.shape[2], n_columns)
        begin = _begins(pairs, slots, shape)[pairs.segment]
        place = (begin + column).where(is_in, math.prod(shape))
        n_positions = len(rows) * n_columns
        positions = rows.new_zeros(n_positions + 1)
        positions.index_copy_(0, (slot * n_columns + column).where(is_in, n_positions), pairs.position.long())
        valid = torch.arange(n_columns, device=rows.device) < counts
        return cls(place, shape, valid, positions[:-1].view_as(valid), bool(is_finite))

    def laid_out(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns numbers of pairs, ``[pairs]``, in their places ``[layers, rows, heads, columns]``; 0 between them."""
        places = numbers.new_zeros(math.prod(self.shape) + 1)
        return places.index_copy_(0, self.place, numbers)[:-1].view(self.shape)

    def listed(self, mask: torch.Tensor) -> torch.Tensor:
        """Returns what a mask ``[layers, rows, heads, columns]`` says of each pair; True for those of other rows."""
        return torch.cat([mask.flatten(), mask.new_ones(1)])[self.place]


def _slots(pairs: PairList, rows: torch.Tensor) -> torch.Tensor:
    """Returns which of the rows each segment is of, int64 ``[segments]``; their number for those of other rows."""
    layers, batch, heads = pairs.shape
    slots = rows.new_full((batch,), len(rows))
    slots[rows] = torch.arange(len(rows), device=rows.device)
    return slots.unsqueeze(1).expand(layers, batch, heads).flatten()


def _columns(pairs: PairList, slot: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the column of each pair of a row, anything for others, and how many columns rows have, ``[rows, 1]``."""
    number, span = pairs.numbered()
    which = (slot * span + number).clamp_(max=n_rows * span)  # pairs of other rows are behind all positions
    is_there = torch.zeros(n_rows * span + 1, dtype=torch.bool, device=slot.device).index_fill_(0, which, True)
    counted = is_there[:-1].view(n_rows, span).cumsum(dim=1, dtype=torch.int32)
    return counted.view(-1)[which.clamp_(max=n_rows * span - 1)] - 1, counted[:, -1:]


def _begins(pairs: PairList, slots: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Returns where the columns of each segment begin in the flattened layout; anything for those of other rows."""
    layers, batch, heads = pairs.shape
    layer = torch.arange(layers, device=slots.device)[:, None, None]
    head = torch.arange(heads, device=slots.device)
    return (((layer * shape[1] + slots.view(layers, batch, heads)) * heads + head) * shape[3]).flatten()
