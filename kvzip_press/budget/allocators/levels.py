"""Allocations that say how many pairs each head would keep at a level, and raise the level until the budget is spent.

The level is one number for all heads, and no head's number of pairs falls when it rises. So the whole keeps exactly
what was asked for, and a larger budget keeps at least as much in every head. Where several heads are due for their next
pair at the same level and the budget has room for some only, the heads with the better next pair get it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvzip_press.budget.allocators.base import Allocation
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Candidates, Counts, Pool
from kvzip_press.errors import InvalidArgumentError

#: ``level -> [heads]``, float64: the pairs that each head keeps there, not yet rounded.
Curve = Callable[[float], torch.Tensor]


@dataclass(frozen=True)
class Levelled(Allocation, ABC):
    """Base of allocations with one budget for all layers, of which each head gets a share that a rule fixes.

    Scores decide which pairs a head keeps, not how many. A layer without protected pairs keeps at least one, and every
    head ``min_kept_per_head`` if the budget allows.
    """

    layers_compete: ClassVar[bool] = True

    @abstractmethod
    def curve(self, row: Candidates, sizes: torch.Tensor) -> Curve:
        """Returns how many pairs each head keeps at a level of 0 or more; no number may fall when the level rises.

        Args:
            row: The competing pairs.
            sizes: ``[heads]``, float64, the number of competing pairs of each head, in the order of ``row.heads``.
        """

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """Returns one pool with everything: it is the whole that keeps what was asked for."""
        return [[(i, slice(None)) for i in heads]]

    def check(self, row: Candidates, least: int, budget: int) -> None:
        """Raises InvalidArgumentError if a budget is too small, ``least`` pairs being kept at level 0."""

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """Returns ``layer_idx -> [heads]``, int64: how many unprotected pairs each head of a row keeps."""
        pool = self.pools(row.heads)[0]
        asked = self.asked(amount, list(row.heads), row.n_counted(pool), len(row.sizes(pool)), row.n_held(pool))
        sizes, budget = torch.tensor(row.sizes(pool)), row.to_spend(pool, asked)
        values = row.best_first(pool)
        first = sizes.clamp(max=self.min_kept_per_head).maximum((values == torch.inf).any(dim=1).long().cpu())
        curve = self.curve(row, sizes.double())
        self.check(row, int(_rounded(curve(0.0), first, sizes).sum()), budget)
        spent = _spent(curve, first, sizes, budget, values)
        parts = spent.split(list(row.heads.values()))
        return {i: part.to(row.values[i].device) for i, part in zip(row.heads, parts, strict=True)}


def _spent(curve: Curve, first: torch.Tensor, sizes: torch.Tensor, budget: int, values: torch.Tensor) -> torch.Tensor:
    """Returns how many pairs each head keeps, ``[heads]``, int64, exactly ``budget`` in all.

    Args:
        curve: Pairs of each head by level.
        first: ``[heads]``, int64, pairs that each head keeps before the level rises; in turns, if too many.
        sizes: ``[heads]``, int64, the most that each head can keep.
        budget: 0 to the sum of ``sizes``.
        values: ``[heads, span]``, scores, which decide between heads whose next pair is due at the same level.
    """
    in_turns = int(first.sum()) >= budget

    def at(level: float) -> torch.Tensor:
        return first.clamp(max=int(level)) if in_turns else _rounded(curve(level), first, sizes)

    low, high = 0.0, 1.0
    while int(at(high).sum()) < budget:
        low, high = high, 2 * high
        if math.isinf(high):
            raise InvalidArgumentError(f"expected a curve that reaches {budget} pairs at some level, got {at(low)}")
    while int((here := at(low)).sum()) < budget and low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if int(at(middle).sum()) <= budget else (low, middle)
    missing = budget - int(here.sum())
    if missing:
        here[_best_next(values, here, (at(high) > here).nonzero()[:, 0])[:missing]] += 1
    return here


def _rounded(wanted: torch.Tensor, first: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Returns whole pairs, ``[heads]``, int64, within what each head has at least and at most."""
    return (wanted + 0.5).floor().minimum(sizes.double()).long().maximum(first)


def _best_next(values: torch.Tensor, kept: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Returns ``heads`` in the order of their next best pair's score; ties by position, then head."""
    order = values[heads.to(values.device)].argsort(dim=1, descending=True, stable=True)
    place = order.gather(1, kept[heads].to(order.device).unsqueeze(1))
    score = values[heads.to(values.device)].gather(1, place).squeeze(1)
    by_position = place.squeeze(1).argsort(stable=True)
    return heads[by_position[score[by_position].argsort(descending=True, stable=True)].cpu()]
