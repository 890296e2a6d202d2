"""The pairs of one batch row that compete for its budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.budget.joined_layers import by_head
from kvzip_press.budget.spending import with_best_marked

Counts = dict[int, torch.Tensor]
Masks = Mapping[int, torch.Tensor]
Numbers = Mapping[int, Sequence[int]]

#: Pairs that compete with each other: those of some heads of some layers, as ``(layer_idx, heads)``.
Pool = list[tuple[int, slice]]


@dataclass(frozen=True)
class Candidates:
    """The competing pairs of one row: scores, and numbers of pairs per head, all by layer index.

    Attributes:
        row: Its index in the batch.
        values: ``[heads, span]``, fp32, the scores; -inf at pairs that do not compete.
        free: Number of pairs that compete.
        protected: Number of pairs that stay in any case.
        charged: Number of protected pairs that count towards the budget.
        counted: Number of pairs that a ratio applies to: all but the protected ones outside the budget.
        held: Number of pairs of earlier turns that count towards a budget in tokens.
        attention: ``[heads, span]``, fp32, what the last token pays to each pair, the most of a group of query heads;
            None if it is not known.
    """

    row: int
    values: Mapping[int, torch.Tensor]
    free: Numbers
    protected: Numbers
    charged: Numbers
    counted: Numbers
    held: Numbers
    attention: Mapping[int, torch.Tensor] | None = None

    @classmethod
    def of_rows(
        cls,
        layers: Mapping[int, torch.Tensor],
        standing: Masks,
        base: Masks,
        protected: torch.Tensor,
        charged: torch.Tensor,
        held: Mapping[int, torch.Tensor],
        attention: Mapping[int, torch.Tensor] | None = None,
    ) -> list[Candidates]:
        """Builds the candidates of each row of a batch; all numbers are read from the device at once.

        Args:
            layers: ``[batch, heads, span]``, scores.
            standing: ``[batch, heads, span]``, bool: the pairs that can be kept at all.
            base: ``[batch, heads, span]``, bool: the pairs that a ratio applies to.
            protected: ``[batch, span]``, bool.
            charged: ``[batch, span]``, bool, the protected positions that count towards the budget.
            held: ``[batch, heads]``, pairs of earlier turns that count towards a budget in tokens.
            attention: ``[batch, heads, span]``, what the last token pays to each pair; None if it is not known.
        """

        def of_heads(
            scores: torch.Tensor, mask: torch.Tensor, base: torch.Tensor, *held: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            safe, paid, outside = (x.to(mask.device).unsqueeze(1) for x in (protected, charged, protected & ~charged))
            free = mask & ~safe
            parts = [part.sum(dim=-1) for part in (free, mask & safe, mask & paid, base & ~outside)]
            parts += held or [torch.zeros_like(parts[0])]
            return scores.masked_fill(~free, -torch.inf), torch.stack(parts, dim=2)

        def held_in(i: int, mask: torch.Tensor) -> torch.Tensor:
            none = torch.zeros(mask.shape[:2], dtype=torch.int64, device=mask.device)
            return held[i].to(mask.device) if i in held else none

        earlier = [{i: held_in(i, mask) for i, mask in standing.items()}] if held else []
        values, counts = by_head(of_heads, layers, standing, base, *earlier)
        numbers = _numbers(counts)
        rows = []
        for row in range(len(protected)):
            own = {i: scores[row] for i, scores in values.items()}
            by_kind = {i: list(zip(*of[row], strict=True)) for i, of in numbers.items()}
            n_free, n_protected, n_charged, n_counted, n_held = (
                {i: kinds[kind] for i, kinds in by_kind.items()} for kind in range(5)
            )
            looked_at = None if attention is None else {i: of[row] for i, of in attention.items()}
            rows.append(cls(row, own, n_free, n_protected, n_charged, n_counted, n_held, looked_at))
        return rows

    @property
    def heads(self) -> dict[int, int]:
        """Number of KV heads of each layer."""
        return {i: values.shape[0] for i, values in self.values.items()}

    def sizes(self, pool: Pool) -> list[int]:
        """Returns how many pairs compete in each head of a pool."""
        return list(_of_pool(self.free, pool))

    def n_counted(self, pool: Pool) -> int:
        """Returns how many pairs of a pool a ratio applies to."""
        return sum(_of_pool(self.counted, pool))

    def n_held(self, pool: Pool) -> int:
        """Returns how many pairs of earlier turns a pool's heads hold."""
        return sum(_of_pool(self.held, pool))

    def to_spend(self, pool: Pool, total: int) -> int:
        """Returns how many unprotected pairs a pool keeps if its budget is ``total`` pairs.

        Protected pairs that count towards the budget are subtracted. The result is at least one for each layer that
        would otherwise be left empty, and at most as many as compete.
        """
        return min(max(total - sum(_of_pool(self.charged, pool)), len(self.bare(pool))), sum(self.sizes(pool)))

    def best_first(self, pool: Pool) -> torch.Tensor:
        """Returns the scores of a pool, ``[heads of all its layers, span]``, with +inf at pairs that stay in any case.

        These are the best pairs of the layers that would otherwise be left empty, one per layer; among equals the one
        with the lowest position, then head.
        """
        bare = self.bare(pool) if len(pool) > 1 else []  # in a pool of one layer the best pair comes first anyway
        device = self.values[pool[0][0]].device
        parts = [(i, self.values[i][heads]) for i, heads in pool]
        return torch.cat([(with_best_marked(values) if i in bare else values).to(device) for i, values in parts])

    def no_counts(self) -> Counts:
        """Returns 0 for every head: ``layer_idx -> [heads]``, int64."""
        return {i: torch.zeros(v.shape[0], dtype=torch.int64, device=v.device) for i, v in self.values.items()}

    def bare(self, pool: Pool) -> list[int]:
        """Returns the layers of a pool that would be left empty: they have competing pairs, but no protected one."""
        return [i for i, heads in pool if not any(self.protected[i][heads]) and any(self.free[i][heads])]


def of_batch(rows: Sequence[Counts], layers: Iterable[int]) -> Counts:
    """Returns ``layer_idx -> [batch, heads]`` of the counts of each row, ``layer_idx -> [heads]``."""
    if len(rows) == 1:  # views: a copy of each layer's would be most operations of a row's budget
        return {layer_idx: rows[0][layer_idx][None] for layer_idx in layers}
    return {layer_idx: torch.stack([row[layer_idx] for row in rows]) for layer_idx in layers}


def _of_pool(per_head: Numbers, pool: Pool) -> Iterator[int]:
    return (number for i, heads in pool for number in per_head[i][heads])


def _numbers(per_layer: Mapping[int, torch.Tensor]) -> dict[int, Any]:
    """Returns ``layer_idx -> [...]`` integer tensors as nested lists, read from the device in one transfer."""
    if not per_layer:
        return {}
    device = next(iter(per_layer.values())).device
    sizes = [numbers.numel() for numbers in per_layer.values()]
    together = torch.cat([numbers.flatten().to(device) for numbers in per_layer.values()]).cpu()
    parts = zip(per_layer.items(), together.split(sizes), strict=True)
    return {layer_idx: part.view(numbers.shape).tolist() for (layer_idx, numbers), part in parts}
