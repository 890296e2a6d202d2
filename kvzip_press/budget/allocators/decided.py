"""Counts that a press decided itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kvzip_press.budget.allocators.base import Allocation
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Candidates, Counts
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class Decided(Allocation):
    """Counts that a press decided itself.

    The amount beside them in a policy is the one that the press was made with; no other can be asked for.

    Args:
        per_head: ``layer_idx -> [batch, heads]``, int64: unprotected pairs to keep.
        like: Short name of the allocation that the counts may be asked for under; they stay the same.
    """

    per_head: Mapping[int, torch.Tensor] = field(default_factory=dict)
    like: str = "head"

    __eq__ = object.__eq__  # tensors are not compared
    __hash__ = object.__hash__

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """Returns the counts that were decided for the row.

        Raises:
            InvalidArgumentError: A head has fewer unprotected pairs.
        """
        decided = {i: counts[row.row] for i, counts in self.per_head.items()}
        for i, free in row.free.items():
            for head, (count, available) in enumerate(zip(decided[i].tolist(), free, strict=True)):
                if not 0 <= count <= available:
                    raise InvalidArgumentError(
                        f"expected a decided count of 0 to {available}, the unprotected pairs of head {head} of layer "
                        f"{i}, got {count}"
                    )
        return decided
