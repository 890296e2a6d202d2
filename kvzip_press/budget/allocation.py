"""From a budget to integers: how many unprotected pairs each (row, layer, head) keeps.

A budget is spent in a pool: all layers, one layer, or one head. In a pool the best pairs win, after those that heads
take in turns because floors reserve them. Pools and what is reserved is all that allocations differ in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from kvzip_press.budget.policy import ALLOCATIONS, check_allocation, check_compression_ratio
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.spending import spend, top_counts, with_best_marked
from kvzip_press.errors import InvalidArgumentError

__all__ = [
    "ALLOCATIONS",
    "Counts",
    "Masks",
    "allocate",
    "check_allocation",
    "check_compression_ratio",
    "standing_pairs",
    "top_counts",
]

Counts = dict[int, torch.Tensor]
Masks = Mapping[int, torch.Tensor]
Pool = list[tuple[int, slice]]  # (layer_idx, its heads) of the pairs that compete


def allocate(
    scores: Scores,
    valid: torch.Tensor,
    *,
    among: Masks | None = None,
    of_all: bool = False,
    held: Mapping[int, torch.Tensor] | None = None,
) -> Counts:
    """Spends the budget of ``scores``.

    A pool (all layers, one layer or one head) of n pairs keeps ``round((1 - compression_ratio) * n)`` of them, or
    ``budget`` for each of its heads where a budget in tokens was given (less what ``held`` says), exactly, whatever the
    ties: those of equal score go by lower position, then lower layer, then lower head. Each batch row has its own
    budget over its own tokens. At least one pair a layer stays in every row.

    Floors are inside the budget. Heads fill them in turns, each with its best pair, then each with its second best, and
    in a turn the better pairs come first: ``min_kept_per_head`` of every head, and for "adakv" ``safeguard`` of the
    budget, so that each head has that part of its equal share, rounded down. When the budget is too small for the
    floors it ends within the turns. A larger budget keeps a superset, under every allocation.

    Args:
        scores: Scores with their policy.
        valid: ``[batch, span]``, bool, False at padding.
        among: ``layer_idx -> [batch, heads, span]``, bool: the pairs that are left to choose from; None for all.
        of_all: Whether a ratio is of all pairs and not of those that are left.
        held: ``layer_idx -> [batch, heads]``: pairs of earlier turns that a budget in tokens has to hold too.

    Returns:
        ``layer_idx -> [batch, num_key_value_heads]``, int64: pairs to keep, protected ones not counted.

    Raises:
        InvalidArgumentError: Pairs are left out, and the press had decided its counts over all of them.
    """
    if among is None and scores.counts is not None:
        return dict(scores.counts)
    if scores.is_decided:
        raise InvalidArgumentError("expected scores that follow a budget, got counts that were decided over all pairs")
    standing = standing_pairs(scores, valid, among)
    base = standing_pairs(scores, valid, None) if of_all else standing
    rows = [_allocate_row(scores, row, standing, base, held) for row in range(valid.shape[0])]
    return {layer_idx: torch.stack([row[layer_idx] for row in rows]) for layer_idx in scores.layers}


def standing_pairs(scores: Scores, valid: torch.Tensor, among: Masks | None) -> dict[int, torch.Tensor]:
    """``layer_idx -> [batch, heads, span]``, bool, on the scores' devices: the pairs that can be kept at all."""
    every = {
        layer_idx: valid.to(values.device).unsqueeze(1).expand_as(values) for layer_idx, values in scores.layers.items()
    }
    return every if among is None else {i: mask & among[i].to(mask.device) for i, mask in every.items()}


@dataclass(frozen=True)
class _Row:
    """One batch row: ``layer_idx -> [heads, span]`` scores, -inf where nothing competes, and numbers of pairs per head.

    ``counted`` are those that a ratio is of: all but the protected ones outside the budget.
    """

    values: Mapping[int, torch.Tensor]
    free: Mapping[int, Sequence[int]]
    protected: Mapping[int, Sequence[int]]
    charged: Mapping[int, Sequence[int]]
    counted: Mapping[int, Sequence[int]]
    held: Mapping[int, Sequence[int]]

    @classmethod
    def of(
        cls, scores: Scores, row: int, standing: Masks, base: Masks, held: Mapping[int, torch.Tensor] | None
    ) -> _Row:
        protected = {i: mask[row] & scores.protected[row].to(mask.device) for i, mask in standing.items()}
        free = {i: mask[row] & ~protected[i] for i, mask in standing.items()}
        charged = {i: mask & scores.charged[row].to(mask.device) for i, mask in protected.items()}
        outside = scores.protected[row] & ~scores.charged[row]
        return cls(
            {i: values[row].masked_fill(~free[i], -torch.inf) for i, values in scores.layers.items()},
            _numbers({i: mask.sum(dim=-1) for i, mask in free.items()}),
            _numbers({i: mask.sum(dim=-1) for i, mask in protected.items()}),
            _numbers({i: mask.sum(dim=-1) for i, mask in charged.items()}),
            _numbers({i: (mask[row] & ~outside.to(mask.device)).sum(dim=-1) for i, mask in base.items()}),
            {} if held is None else _numbers({i: pairs[row] for i, pairs in held.items()}),
        )


def _numbers(per_head: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
    """Lists of ``layer_idx -> [heads]`` tensors, read from the device at once."""
    if not per_head:
        return {}
    device = next(iter(per_head.values())).device
    numbers = iter(torch.cat([values.to(device) for values in per_head.values()]).tolist())
    return {layer_idx: [next(numbers) for _ in values] for layer_idx, values in per_head.items()}


def _allocate_row(
    scores: Scores, index: int, standing: Masks, base: Masks, held: Mapping[int, torch.Tensor] | None
) -> Counts:
    row = _Row.of(scores, index, standing, base, held)
    counts = {i: torch.zeros(v.shape[0], dtype=torch.int64, device=v.device) for i, v in row.values.items()}
    for pool in _pools(scores.allocation, row):
        budget = _budget(scores, row, pool)
        sizes = _of_pool(row.free, pool)
        if budget == 0:
            continue
        spent = spend(_best_first(row, pool), sizes, budget, _reserved(scores, sizes, budget))
        for (i, heads), part in zip(pool, spent.split([len(row.free[i][heads]) for i, heads in pool]), strict=True):
            counts[i][heads] = part.to(counts[i].device)
    return counts


def _pools(allocation: str, row: _Row) -> list[Pool]:
    if allocation == "global":
        return [[(i, slice(None)) for i in row.values]]
    if allocation == "head":
        return [[(i, slice(head, head + 1))] for i, values in row.values.items() for head in range(values.shape[0])]
    return [[(i, slice(None))] for i in row.values]


def _of_pool(per_head: Mapping[int, Sequence[int]], pool: Pool) -> list[int]:
    return [number for i, heads in pool if i in per_head for number in per_head[i][heads]]


def _budget(scores: Scores, row: _Row, pool: Pool) -> int:
    """Pairs that a pool keeps, protected ones not counted, at most as many as it has."""
    free = _of_pool(row.free, pool)
    charged = sum(_of_pool(row.charged, pool))
    if scores.budget is None:
        total = round((1 - scores.ratio_of(pool[0][0])) * sum(_of_pool(row.counted, pool)))
    else:
        total = scores.budget * len(free) - sum(_of_pool(row.held, pool))
    return min(max(total - charged, len(_bare(row, pool))), sum(free))


def _bare(row: _Row, pool: Pool) -> list[int]:
    """Layers of a pool that would be left empty: nothing of them is protected, and they have pairs."""
    return [i for i, heads in pool if not any(row.protected[i][heads]) and any(row.free[i][heads])]


def _reserved(scores: Scores, sizes: Sequence[int], budget: int) -> int:
    """How much of a budget goes to heads in turns."""
    floors = sum(min(size, scores.min_kept_per_head) for size in sizes)
    share = int(Fraction(str(scores.safeguard)) * budget) if scores.allocation == "adakv" else 0
    return min(max(floors, share), budget)


def _best_first(row: _Row, pool: Pool) -> torch.Tensor:
    """Scores of a pool, ``[heads of all its layers, span]``, +inf at the best pair of each layer that may not be empty.

    Lowest position, then head, among equals; every budget holds these pairs.
    """
    bare = _bare(row, pool) if len(pool) > 1 else []  # of one layer the best comes first anyway
    device = row.values[pool[0][0]].device
    parts = [(i, row.values[i][heads]) for i, heads in pool]
    return torch.cat([(with_best_marked(values) if i in bare else values).to(device) for i, values in parts])
