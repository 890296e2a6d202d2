"""From a compression ratio to integers: how many unprotected pairs each (row, layer, head) keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.scores import Scores

#: "global": all pairs of all layers and heads compete (KVzip). "layer": every layer keeps the same number, its heads
#: compete. "head": every head keeps the same number (SnapKV and most others).
ALLOCATIONS = ("global", "layer", "head")

Counts = dict[int, torch.Tensor]


def check_compression_ratio(compression_ratio: float) -> float:
    """Returns the ratio as a float, or raises InvalidArgumentError unless it is a number in [0, 1)."""
    valid = isinstance(compression_ratio, (int, float)) and not isinstance(compression_ratio, bool)
    if not valid or math.isnan(compression_ratio) or not 0 <= compression_ratio < 1:
        raise InvalidArgumentError(
            f"expected compression_ratio (the fraction removed) in [0, 1), got {compression_ratio!r}"
        )
    return float(compression_ratio)


def check_allocation(allocation: str) -> str:
    """Returns the allocation, or raises InvalidArgumentError when it is not one of :data:`ALLOCATIONS`."""
    if allocation not in ALLOCATIONS:
        raise InvalidArgumentError(f"expected allocation to be one of {ALLOCATIONS}, got {allocation!r}")
    return allocation


def allocate(scores: Scores, valid: torch.Tensor) -> Counts:
    """Spends the budget of ``scores``.

    A pool (all layers, one layer or one head) of n pairs keeps ``round((1 - compression_ratio) * n)`` of them, exactly,
    whatever the ties: those of equal score go by lower position, then lower layer, then lower head. Each batch row has
    its own budget over its own tokens. At least one pair a layer stays in every row.

    Args:
        scores: Scores with their policy.
        valid: ``[batch, span]``, bool, False at padding.

    Returns:
        ``layer_idx -> [batch, num_key_value_heads]``, int64: pairs to keep, protected ones not counted.
    """
    if scores.counts is not None:
        return dict(scores.counts)
    check_compression_ratio(scores.compression_ratio)
    check_allocation(scores.allocation)
    rows = [_allocate_row(scores, row, valid[row]) for row in range(valid.shape[0])]
    return {layer_idx: torch.stack([row[layer_idx] for row in rows]) for layer_idx in scores.layers}


def _allocate_row(scores: Scores, row: int, valid: torch.Tensor) -> Counts:
    eligible = valid & ~scores.protected[row]
    n_protected = int((valid & scores.protected[row]).sum())
    pool: Mapping[int, torch.Tensor] = {
        layer_idx: values[row][:, eligible.to(values.device)] for layer_idx, values in scores.layers.items()
    }
    if scores.allocation == "global":
        return _spend(pool, scores, n_protected)
    counts: Counts = {}
    for layer_idx, values in pool.items():
        if scores.allocation == "layer":
            counts |= _spend({layer_idx: values}, scores, n_protected)
        else:
            heads = [_spend({layer_idx: head[None]}, scores, n_protected)[layer_idx] for head in values]
            counts[layer_idx] = torch.cat(heads)
    return counts


def _spend(pool: Mapping[int, torch.Tensor], scores: Scores, n_protected: int) -> Counts:
    """Counts per head of one pool ``layer_idx -> [heads, n]``: the best of all its pairs, exactly as many as it may."""
    segments = sum(values.shape[0] for values in pool.values())
    n_pairs = sum(values.numel() for values in pool.values())
    charged = segments * n_protected if scores.protected_count else 0
    budget = round((1 - scores.compression_ratio) * (n_pairs + charged)) - charged
    floor = min(len(pool), n_pairs) if n_protected == 0 else 0
    budget = min(max(budget, floor), n_pairs)
    if n_pairs == 0 or budget == 0:
        return {layer_idx: torch.zeros(v.shape[0], dtype=torch.int64, device=v.device) for layer_idx, v in pool.items()}
    device = next(iter(pool.values())).device
    first = [_best_first(values) if floor else values for values in pool.values()]
    counts = top_counts(torch.cat([values.to(device) for values in first]), budget)
    split = counts.split([values.shape[0] for values in pool.values()])
    return {layer_idx: part.to(pool[layer_idx].device) for layer_idx, part in zip(pool, split, strict=True)}


def _best_first(values: torch.Tensor) -> torch.Tensor:
    """Marks a layer's best pair (lowest position, then head, among equals) so that every budget holds it."""
    n = values.shape[1]
    best = int(values.T.reshape(-1).argmax())
    marked = values.clone()
    marked[best % values.shape[0], best // values.shape[0]] = torch.inf
    assert n > 0
    return marked


def top_counts(values: torch.Tensor, budget: int) -> torch.Tensor:
    """How many of the ``budget`` largest entries lie in each row; equal entries go by lower column, then lower row.

    Args:
        values: ``[segments, n]``, no NaN.
        budget: 1 to ``values.numel()``.

    Returns:
        ``[segments]``, int64, summing to ``budget`` exactly.
    """
    threshold = values.reshape(-1).kthvalue(values.numel() - budget + 1).values
    counts = (values > threshold).sum(dim=1)
    missing = budget - int(counts.sum())
    tied = (values == threshold).T.nonzero()[:missing, 1]  # rows of the transpose are columns: lower positions first
    return counts + torch.bincount(tied, minlength=values.shape[0])
