"""The pairs of one batch row that compete for its budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvzip_press.budget.spending import with_best_marked

Counts = dict[int, torch.Tensor]
Masks = Mapping[int, torch.Tensor]
Numbers = Mapping[int, Sequence[int]]

#: Pairs that compete with each other: those of some heads of some layers, as ``(layer_idx, heads)``.
Pool = list[tuple[int, slice]]


@dataclass(frozen=True)
class Candidates:
    """One row: scores, and numbers of pairs per head, all by layer index.

    Attributes:
        row: Its index in the batch.
        values: ``[heads, span]``, fp32, the scores; -inf where nothing competes.
        free: Pairs that compete.
        protected: Pairs that stay in any case.
        charged: Those of them that count inside a budget.
        counted: Pairs that a ratio is of: all but the protected ones outside the budget.
        held: Pairs of earlier turns that a budget in tokens has to hold too; empty without any.
    """

    row: int
    values: Mapping[int, torch.Tensor]
    free: Numbers
    protected: Numbers
    charged: Numbers
    counted: Numbers
    held: Numbers

    @classmethod
    def of_row(
        cls,
        row: int,
        layers: Mapping[int, torch.Tensor],
        standing: Masks,
        base: Masks,
        protected: torch.Tensor,
        charged: torch.Tensor,
        held: Mapping[int, torch.Tensor],
    ) -> Candidates:
        """A row of a batch.

        Args:
            row: Its index.
            layers: ``[batch, heads, span]``, scores.
            standing: ``[batch, heads, span]``, bool: the pairs that can be kept at all.
            base: The same: the pairs that a ratio is of.
            protected: ``[batch, span]``, bool.
            charged: ``[batch, span]``, bool, the protected positions that count inside the budget.
            held: ``[batch, heads]``.
        """
        safe = {i: mask[row] & protected[row].to(mask.device) for i, mask in standing.items()}
        free = {i: mask[row] & ~safe[i] for i, mask in standing.items()}
        paid = {i: mask & charged[row].to(mask.device) for i, mask in safe.items()}
        outside = protected[row] & ~charged[row]
        return cls(
            row,
            {i: values[row].masked_fill(~free[i], -torch.inf) for i, values in layers.items()},
            _numbers({i: mask.sum(dim=-1) for i, mask in free.items()}),
            _numbers({i: mask.sum(dim=-1) for i, mask in safe.items()}),
            _numbers({i: mask.sum(dim=-1) for i, mask in paid.items()}),
            _numbers({i: (mask[row] & ~outside.to(mask.device)).sum(dim=-1) for i, mask in base.items()}),
            _numbers({i: pairs[row] for i, pairs in held.items()}),
        )

    @property
    def heads(self) -> dict[int, int]:
        """KV heads of each layer."""
        return {i: values.shape[0] for i, values in self.values.items()}

    def sizes(self, pool: Pool) -> list[int]:
        """Pairs that compete in each head of a pool."""
        return list(_of_pool(self.free, pool))

    def n_counted(self, pool: Pool) -> int:
        """Pairs of a pool that a ratio is of."""
        return sum(_of_pool(self.counted, pool))

    def n_held(self, pool: Pool) -> int:
        """Pairs of earlier turns in a pool's heads."""
        return sum(_of_pool(self.held, pool))

    def to_spend(self, pool: Pool, total: int) -> int:
        """Of ``total`` pairs that a pool is to keep, those that are not protected.

        At least one a layer that would be left empty, at most as many as there are.
        """
        return min(max(total - sum(_of_pool(self.charged, pool)), len(self._bare(pool))), sum(self.sizes(pool)))

    def best_first(self, pool: Pool) -> torch.Tensor:
        """Scores of a pool, ``[heads of all its layers, span]``, +inf at the best pair of each layer left empty else.

        Lowest position, then head, among equals; every budget holds these pairs.
        """
        bare = self._bare(pool) if len(pool) > 1 else []  # of one layer the best comes first anyway
        device = self.values[pool[0][0]].device
        parts = [(i, self.values[i][heads]) for i, heads in pool]
        return torch.cat([(with_best_marked(values) if i in bare else values).to(device) for i, values in parts])

    def no_counts(self) -> Counts:
        """0 for every head: ``[heads]``, int64."""
        return {i: torch.zeros(v.shape[0], dtype=torch.int64, device=v.device) for i, v in self.values.items()}

    def _bare(self, pool: Pool) -> list[int]:
        """Layers of a pool that would be left empty: nothing of them is protected, and they have pairs."""
        return [i for i, heads in pool if not any(self.protected[i][heads]) and any(self.free[i][heads])]


def _of_pool(per_head: Numbers, pool: Pool) -> Iterator[int]:
    return (number for i, heads in pool if i in per_head for number in per_head[i][heads])


def _numbers(per_head: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
    """Lists of ``layer_idx -> [heads]`` tensors, read from the device at once."""
    if not per_head:
        return {}
    device = next(iter(per_head.values())).device
    numbers = iter(torch.cat([values.to(device) for values in per_head.values()]).tolist())
    return {layer_idx: [next(numbers) for _ in values] for layer_idx, values in per_head.items()}
