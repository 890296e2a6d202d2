"""Spends the budget of one pool: takes tensors of scores, returns numbers of pairs per head."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch


def with_best_marked(values: torch.Tensor) -> torch.Tensor:
    """Returns a copy of ``[heads, n]`` with +inf at its largest entry (lowest column, then row, among equals)."""
    best = values.T.reshape(-1).argmax()
    marked = values.clone()
    marked[best % values.shape[0], best // values.shape[0]] = torch.inf
    return marked


def spend(values: torch.Tensor, sizes: Sequence[int], budget: int, n_reserved: int) -> torch.Tensor:
    """Returns how many pairs of each head are among the ``budget`` best, of which heads take ``n_reserved`` in turns.

    Args:
        values: ``[heads, n]``, -inf at pairs that do not compete, +inf at those that come first in any case.
        sizes: Number of competing pairs in each head.
        budget: 1 to the sum of ``sizes``.
        n_reserved: 0 to ``budget``.

    Returns:
        ``[heads]``, int64, summing to ``budget`` exactly.
    """
    if len(sizes) == 1:
        return torch.tensor([budget], device=values.device)
    return top_counts(_turns_first(values, sizes, n_reserved) if n_reserved else values, budget)


def _turns_first(values: torch.Tensor, sizes: Sequence[int], n_reserved: int) -> torch.Tensor:
    """Returns scores with +inf at the first ``n_reserved`` pairs when heads take turns, each its best remaining one."""

    def taken(turns: int) -> int:
        return sum(min(size, turns) for size in sizes)

    turns = bisect_right(range(values.shape[1] + 1), n_reserved, key=taken) - 1
    rest = n_reserved - taken(turns)
    order = values.argsort(dim=1, descending=True, stable=True)
    marked = values.scatter(1, order[:, :turns], torch.inf)
    if rest:  # the last turn, which not all heads get, goes to the better pairs; ties by position, then head
        head_next = order[:, turns]
        by_position = head_next.argsort(stable=True)
        scored = values.gather(1, head_next.unsqueeze(1)).squeeze(1)[by_position]
        heads = by_position[scored.argsort(descending=True, stable=True)[:rest]]
        marked[heads, head_next[heads]] = torch.inf
    return marked.masked_fill(values == -torch.inf, -torch.inf)


def top_counts(values: torch.Tensor, budget: int) -> torch.Tensor:
    """Returns how many of the ``budget`` largest entries are in each row; ties go to the lower column, then row.

    Args:
        values: ``[segments, n]``, fp32, no NaN.
        budget: 1 to ``values.numel()``.

    Returns:
        ``[segments]``, int64, summing to ``budget`` exactly.
    """
    threshold = kth_largest(values, budget)
    counts = (values > threshold).sum(dim=1)
    missing = budget - int(counts.sum())
    tied = (values == threshold).T.nonzero()[:missing, 1]  # rows of the transpose are columns: lower positions first
    return counts + torch.bincount(tied, minlength=values.shape[0])


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the k-th largest entry, ``[]``, of ``values``, fp32 without NaN, ``1 <= k <= values.numel()``."""
    if values.is_cuda:
        return kth_largest_by_bits(values, k)
    return values.reshape(-1).kthvalue(values.numel() - k + 1).values


def kth_largest_by_bits(values: torch.Tensor, k: int) -> torch.Tensor:
    """Does what :func:`kth_largest` does, for GPUs: finds the entry bit by bit, counting entries not below a bound.

    CUDA's ``kthvalue`` runs in a single block (122 ms for the 17 million scores of an 8B model at 65536 tokens), and
    its ``topk`` sorts with 64-bit indices. Counting 32 times takes little time and almost no memory.
    """
    ordered = _ordered(values.contiguous().view(torch.int32))
    lower = ordered.new_tensor(-(2**31))
    for bit in reversed(range(32)):
        higher = lower ^ (-(2**31) if bit == 31 else 2**bit)  # the first step goes from the least integer to 0
        lower = torch.where(torch.count_nonzero(ordered >= higher) >= k, higher, lower)
    return _ordered(lower).view(torch.float32)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Maps the bits of floats to integers in the floats' order, and back; those of negative floats grow downwards."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
