"""How pairs compete for a budget. One class an allocation; adding one is a class here, and a name where it has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from kvzip_press.budget.amount import Amount, is_int
from kvzip_press.budget.candidates import Candidates, Counts, Pool
from kvzip_press.budget.spending import spend
from kvzip_press.errors import InvalidArgumentError

SAFEGUARD = 0.2
"""AdaKV's alpha."""


@dataclass(frozen=True)
class Allocation(ABC):
    """A rule that turns an amount into a number of pairs for each head.

    In a pool the best pairs win, after those that heads take in turns because floors reserve them. Which pools there
    are, and what is reserved, is all that most allocations differ in; one of another kind gives its own :meth:`counts`.

    Args:
        min_kept_per_head: Unprotected pairs that every head keeps, inside the budget, as far as its pairs and the
            budget go.
        safeguard: Of :class:`AdaKV`, in [0, 1]; others carry it on for a caller who asks for "adakv" by name.

    Raises:
        InvalidArgumentError: A value out of range.
    """

    min_kept_per_head: int = 0
    safeguard: float = SAFEGUARD

    def __post_init__(self) -> None:
        safeguard, floor = self.safeguard, self.min_kept_per_head
        if isinstance(safeguard, bool) or not isinstance(safeguard, (int, float)) or not 0 <= safeguard <= 1:
            raise InvalidArgumentError(f"expected safeguard (a part of the equal share) in [0, 1], got {safeguard!r}")
        if not is_int(floor) or floor < 0:
            raise InvalidArgumentError(f"expected min_kept_per_head to be an int of at least 0, got {floor!r}")

    @abstractmethod
    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """The pools of a model, from ``layer_idx -> KV heads``."""

    def asked(self, amount: Amount, layer_idx: int, n_pairs: int, n_heads: int, n_held: int = 0) -> int:
        """Pairs that a pool is to keep; the arguments are those of :meth:`kvzip_press.budget.amount.Amount.pairs`."""
        return amount.pairs(layer_idx, n_pairs, n_heads, n_held)

    def reserved(self, sizes: Sequence[int], budget: int) -> int:
        """How much of a pool's budget goes to its heads in turns, at most all.

        Args:
            sizes: Pairs that compete in each head.
            budget: Pairs that the pool keeps of them.
        """
        return min(sum(min(size, self.min_kept_per_head) for size in sizes), budget)

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """``layer_idx -> [heads]``, int64: unprotected pairs that each head of a row keeps."""
        counts = row.no_counts()
        for pool in self.pools(row.heads):
            sizes = row.sizes(pool)
            asked = self.asked(amount, pool[0][0], row.n_counted(pool), len(sizes), row.n_held(pool))
            budget = row.to_spend(pool, asked)
            if budget == 0:
                continue
            spent = spend(row.best_first(pool), sizes, budget, self.reserved(sizes, budget))
            for (i, heads), part in zip(pool, spent.split([len(row.free[i][heads]) for i, heads in pool]), strict=True):
                counts[i][heads] = part.to(counts[i].device)
        return counts


@dataclass(frozen=True)
class Global(Allocation):
    """All pairs of all layers and heads compete: "global" (KVzip)."""

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """One, of everything."""
        return [[(i, slice(None)) for i in heads]]


@dataclass(frozen=True)
class PerLayer(Allocation):
    """Every layer keeps the same part, and its heads compete: "layer"."""

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """One a layer."""
        return [[(i, slice(None))] for i in heads]


@dataclass(frozen=True)
class PerHead(Allocation):
    """Every head keeps the same part: "head" (SnapKV and most others)."""

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """One a head."""
        return [[(i, slice(head, head + 1))] for i, n_heads in heads.items() for head in range(n_heads)]


@dataclass(frozen=True)
class AdaKV(PerLayer):
    """As "layer", but every head keeps a safeguarded part of its equal share: "adakv".

    AdaKV, https://arxiv.org/abs/2407.11550. The share is the layer's unprotected pairs over its heads, rounded down.
    """

    def reserved(self, sizes: Sequence[int], budget: int) -> int:
        """The floors, or the safeguarded part of the budget where that is more."""
        return max(super().reserved(sizes, budget), int(Fraction(str(self.safeguard)) * budget))


@dataclass(frozen=True, eq=False)
class Decided(Allocation):
    """What a press decided by itself: the amount is what it was made with, and no other can be asked for.

    Args:
        per_head: ``layer_idx -> [batch, heads]``, int64: unprotected pairs to keep.
    """

    per_head: Mapping[int, torch.Tensor] = field(default_factory=dict)

    __eq__ = object.__eq__  # tensors are not compared
    __hash__ = object.__hash__

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """None: nothing competes."""
        return []

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """What was decided for the row."""
        return {i: counts[row.row] for i, counts in self.per_head.items()}


#: The short names of allocations.
ALLOCATIONS: dict[str, type[Allocation]] = {
    "global": Global,
    "layer": PerLayer,
    "head": PerHead,
    "adakv": AdaKV,
}


def allocation_of(given: str | Allocation, *, min_kept_per_head: int = 0, safeguard: float = SAFEGUARD) -> Allocation:
    """The allocation of a short name with these floors, or the one that is given, which brings its own.

    Raises:
        InvalidArgumentError: No such allocation, floors out of range, or floors beside an allocation that is an object.
    """
    floors: dict[str, Any] = {"min_kept_per_head": min_kept_per_head, "safeguard": safeguard}
    if isinstance(given, Allocation):
        if floors != {"min_kept_per_head": 0, "safeguard": SAFEGUARD}:
            raise InvalidArgumentError(f"expected floors as arguments of {given!r}, got {floors} beside it")
        return given
    if not isinstance(given, str) or given not in ALLOCATIONS:
        raise InvalidArgumentError(f"expected allocation to be one of {tuple(ALLOCATIONS)}, got {given!r}")
    return ALLOCATIONS[given](**floors)
