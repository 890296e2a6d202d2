"""Allocations of pools in which the best pairs win: everything, a layer, a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from kvzip_press.budget.allocators.base import Allocation
from kvzip_press.budget.candidates import Pool


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

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """Returns one pool per head."""
        return [[(i, slice(head, head + 1))] for i, n_heads in heads.items() for head in range(n_heads)]


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
