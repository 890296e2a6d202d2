"""Layers that keep everything, within the budget of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvzip_press.arguments.numbers import is_int
from kvzip_press.budget.allocators.levels import Curve, Levelled
from kvzip_press.budget.candidates import Candidates
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class SkippingLayers(Levelled):
    """Some layers keep every pair, and the heads of the others equally many, so that the whole keeps what was asked.

    Args:
        layers: The layers that keep everything, by index.
        min_kept_per_head: See :class:`Allocation`.
        safeguard: See :class:`Allocation`.

    Raises:
        InvalidArgumentError: ``layers`` are no layer indices.
    """

    layers: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.layers
        if not isinstance(layers, Sequence) or not all(is_int(i) and i >= 0 for i in layers):
            raise InvalidArgumentError(
                f"expected the layers to skip as a sequence of layer indices, got {layers!r:.80}"
            )
        object.__setattr__(self, "layers", tuple(dict.fromkeys(layers)))

    def check(self, row: Candidates, least: int, budget: int) -> None:
        """Raises InvalidArgumentError if the budget does not hold these layers, and the floors of the others."""
        if least > budget:
            raise InvalidArgumentError(
                f"expected a budget that holds the layers to skip, {list(self.layers)}, got one of {budget} pairs for "
                f"all layers, where these and the floors of the others have {least}: skip fewer layers, or remove less"
            )

    def curve(self, row: Candidates, sizes: torch.Tensor) -> Curve:
        """Returns everything for the layers that are skipped, the level itself for the others.

        Raises:
            InvalidArgumentError: A layer is not one that can be compressed.
        """
        if unknown := set(self.layers) - set(row.heads):
            raise InvalidArgumentError(
                f"expected layers to skip among those that can be compressed, {sorted(row.heads)}, got "
                f"{sorted(unknown)}"
            )
        skipped = torch.tensor([i in self.layers for i, heads in row.heads.items() for _ in range(heads)])
        return lambda level: torch.where(skipped, sizes, torch.full_like(sizes, level))
