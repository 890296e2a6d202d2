"""Allocations of pools in which the best pairs win: everything, a layer, a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from kvzip_press.budget.allocators.base import Allocation
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Candidates, Counts, Pool


@dataclass(frozen=True)
class Global(Allocation):
    """All pairs of all layers and heads compete: "global" (KVzip)."""

    name: ClassVar[str] = "global"
    layers_compete: ClassVar[bool] = True

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """Returns one pool with everything."""
        return [[(i, slice(None)) for i in heads]]


@dataclass(frozen=True)
class PerLayer(Allocation):
    """Every layer keeps the same fraction, and its heads compete: "layer"."""

    name: ClassVar[str] = "layer"

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """Returns one pool per layer."""
        return [[(i, slice(None))] for i in heads]


@dataclass(frozen=True)
class PerHead(Allocation):
    """Every head keeps the same fraction: "head" (SnapKV and most others)."""

    name: ClassVar[str] = "head"
    heads_alone: ClassVar[bool] = True

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """Returns one pool per head."""
        return [[(i, slice(head, head + 1))] for i, n_heads in heads.items() for head in range(n_heads)]

    def counts_of_rows(self, rows: Sequence[Candidates], amount: Amount) -> Counts:
        """Returns what :meth:`counts` does of each row: no pair competes, so that it follows from numbers alone.

        Heads whose numbers are equal, as most are while the model writes, are counted once.
        """
        if type(self).pools is not PerHead.pools:  # of a subclass, in which pairs may compete
            return super().counts_of_rows(rows, amount)
        known: dict[tuple[int, ...], int] = {}

        def kept(i: int, free: int, protected: int, charged: int, counted: int, held: int) -> int:
            numbers = (i, free, protected, charged, counted, held)
            if numbers not in known:
                least = int(free > 0 and not protected)
                known[numbers] = min(max(self.asked(amount, [i], counted, 1, held) - charged, least), free)
            return known[numbers]

        def of_layer(row: Candidates, i: int) -> list[int]:
            heads = zip(row.free[i], row.protected[i], row.charged[i], row.counted[i], row.held[i], strict=True)
            return [kept(i, *numbers) for numbers in heads]

        counts = {i: torch.tensor([of_layer(row, i) for row in rows], dtype=torch.int64) for i in rows[0].values}
        return {i: numbers.to(rows[0].values[i].device, non_blocking=True) for i, numbers in counts.items()}


@dataclass(frozen=True)
class AdaKV(PerLayer):
    """Like "layer", but every head keeps a safeguarded fraction of its equal share: "adakv".

    AdaKV, https://arxiv.org/abs/2407.11550. The equal share is the layer's budget of unprotected pairs divided by its
    number of heads; the safeguarded fraction of it is rounded down.
    """

    name: ClassVar[str] = "adakv"

    def reserved(self, sizes: Sequence[int], budget: int) -> int:
        """Returns the floors or the safeguarded fraction of the budget, whichever is more."""
        return max(super().reserved(sizes, budget), int(Fraction(str(self.safeguard)) * budget))
