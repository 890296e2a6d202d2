"""PyramidKV's budgets: a straight line over the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvzip_press.arguments.numbers import is_int
from kvzip_press.budget.allocators.levels import Curve, Levelled
from kvzip_press.budget.candidates import Candidates
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Pyramid(Levelled):
    """Lower layers keep more, on a straight line: "pyramid".

    PyramidKV, https://arxiv.org/abs/2406.02069. If heads keep ``c`` unprotected pairs on average, those of the last
    layer keep ``c / beta``, those of the first ``2 c - c / beta``, and those between lie on the line; a first layer
    that would keep more than it has keeps all, and the last one ``2 c`` less that. The heads of a layer keep equally
    many. The paper's code rounds each layer by itself, and drops the line for short contexts; here the line always
    holds, the whole keeps exactly what was asked for, and budgets are nested. Budgets are per KV head.

    Args:
        beta: How steep the line is; at least 1 (even). The first layer keeps ``2 beta - 1`` times as much as the last.
        min_kept_per_head: See :class:`Allocation`.
        safeguard: See :class:`Allocation`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    beta: float = 20

    name: ClassVar[str] = "pyramid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_int(self.beta) or isinstance(self.beta, float)) or not 1 <= self.beta < float("inf"):
            raise InvalidArgumentError(f"expected beta (PyramidKV's steepness) of at least 1, got {self.beta!r}")

    def curve(self, row: Candidates, sizes: torch.Tensor) -> Curve:
        """Returns the line over layers, by the mean number of pairs of a head."""
        last = max(len(row.heads) - 1, 1)
        place = torch.tensor([i / last for i, heads in enumerate(row.heads.values()) for _ in range(heads)])
        place = place.double() if len(row.heads) > 1 else torch.full_like(sizes, 0.5)
        most, least = 2 - 1 / self.beta, 1 / self.beta

        def line(level: float) -> torch.Tensor:
            first = (level * most * torch.ones_like(sizes)).minimum(sizes)
            end = (level * least * torch.ones_like(sizes)).maximum(2 * level - sizes)
            return first * (1 - place) + end * place

        return line
