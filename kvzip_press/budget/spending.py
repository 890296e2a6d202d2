"""Spending one pool's budget: tensors of scores in, pairs per head out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch


def with_best_marked(values: torch.Tensor) -> torch.Tensor:
    """A copy of ``[heads, n]`` with +inf at its largest entry (lowest column, then row, among equals)."""
    best = values.T.reshape(-1).argmax()
    marked = values.clone()
    marked[best % values.shape[0], best // values.shape[0]] = torch.inf
    return marked


def spend(values: torch.Tensor, sizes: Sequence[int], budget: int, n_reserved: int) -> torch.Tensor:
    """How many pairs of each head are among the best ``budget`` ones, of which ``n_reserved`` go to heads in turns.

    Args:
        values: ``[heads, n]``, -inf where nothing competes, +inf at what comes first in any case.
        sizes: Pairs that compete in each head.
        budget: 1 to the sum of ``sizes``.
        n_reserved: 0 to ``budget``.

    Returns:
        ``[heads]``, int64, summing to ``budget`` exactly.
    """
    if len(sizes) == 1:
        return torch.tensor([budget], device=values.device)
    return top_counts(_turns_first(values, sizes, n_reserved) if n_reserved else values, budget)


def _turns_first(values: torch.Tensor, sizes: Sequence[int], n_reserved: int) -> torch.Tensor:
    """Scores with +inf at the first ``n_reserved`` pairs when heads take turns, each with its best one left."""

    def taken(turns: int) -> int:
        return sum(min(size, turns) for size in sizes)

    turns = bisect_right(range(values.shape[1] + 1), n_reserved, key=taken) - 1
    rest = n_reserved - taken(turns)
    order = values.argsort(dim=1, descending=True, stable=True)
    marked = values.scatter(1, order[:, :turns], torch.inf)
    if rest:  # a last turn that not all heads have: the better pairs, among equals by position, then head
        head_next = order[:, turns]
        by_position = head_next.argsort(stable=True)
        scored = values.gather(1, head_next.unsqueeze(1)).squeeze(1)[by_position]
        heads = by_position[scored.argsort(descending=True, stable=True)[:rest]]
        marked[heads, head_next[heads]] = torch.inf
    return marked.masked_fill(values == -torch.inf, -torch.inf)


def top_counts(values: torch.Tensor, budget: int) -> torch.Tensor:
    """How many of the ``budget`` largest entries lie in each row; equal entries go by lower column, then lower row.

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
    """The k-th largest entry, ``[]``, of ``values``, fp32 without NaN, ``1 <= k <= values.numel()``."""
    if values.is_cuda:
        return kth_largest_by_bits(values, k)
    return values.reshape(-1).kthvalue(values.numel() - k + 1).values


def kth_largest_by_bits(values: torch.Tensor, k: int) -> torch.Tensor:
    """The same, found bit by bit by counting what is not below: for GPUs.

    CUDA's ``kthvalue`` is one block's work (122 ms for the 17 million scores of an 8B model at 65536 tokens), and its
    ``topk`` a sort with 64-bit indices. Counting 32 times takes little time and no memory to speak of.
    """
    ordered = _ordered(values.contiguous().view(torch.int32))
    lower = ordered.new_tensor(-(2**31))
    for bit in reversed(range(32)):
        higher = lower ^ (-(2**31) if bit == 31 else 2**bit)  # the first step goes from the least integer to 0
        lower = torch.where(torch.count_nonzero(ordered >= higher) >= k, higher, lower)
    return _ordered(lower).view(torch.float32)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Bits of floats as integers in the floats' order, and back: negative floats grow downwards."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
