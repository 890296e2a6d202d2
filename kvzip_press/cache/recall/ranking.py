"""From a query to the pairs that it reads: groups are ranked, and listed until the budget is full.

All shapes are known beforehand and nothing is read from the device, so a captured graph ranks anew in each replay.
"""

from __future__ import annotations

import torch

from kvzip_press.cache.codecs.held import Held
from kvzip_press.cache.recall.groups import MARKS, ORDER, SIZES
from kvzip_press.cache.recall.policy import Recall
from kvzip_press.kernels.numerics import accumulation_dtype


def listed(
    recall: Recall,
    groups: Held,
    query: torch.Tensor,
    num_heads: int,
    *,
    row_index: torch.Tensor | None = None,
    scaling: float | None = None,
    width: int,
    all_full: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the pairs that one token of each row reads.

    Args:
        recall: How groups are ranked.
        groups: The groups of all segments, as :mod:`kvzip_press.cache.recall.groups` holds them.
        query: ``[batch, num_attention_heads, 1, head_dim]``.
        num_heads: Number of key-value heads.
        row_index: Batch row -> packed row, int64 ``[batch]``; None if they are the same.
        scaling: Factor of the logits; None means ``head_dim ** -0.5``.
        width: Pairs that the longest list has: those of the longest segment, at most the budget.
        all_full: Whether it is known that every list has as many.

    Returns:
        The listed pairs, int32 ``[at least all]``, and where each list begins, int32 ``[lists + 1]``, in the order of
        (batch row, key-value head) or, if each query head has its own, (batch row, query head).
    """
    bounds, sizes = _by_row(groups.cu_seqlens[:-1], groups.tables[SIZES], num_heads, row_index)
    worth = _worth(recall, groups, query, num_heads, row_index, scaling)  # [batch, heads, lists a head, groups]
    ranked = torch.nn.functional.pad(
        worth.sort(dim=-1, descending=True, stable=True).indices + 1, (1, 0)
    )  # first tokens first
    sizes = sizes.long()[:, :, None].expand_as(ranked)
    starts, counts = (sizes.cumsum(-1) - sizes).gather(-1, ranked), sizes.gather(-1, ranked)
    ends = counts.cumsum(-1)
    slots = torch.arange(width, device=query.device).expand(*ends.shape[:3], -1).contiguous()
    place = torch.searchsorted(ends, slots, right=True).clamp(max=ends.shape[-1] - 1)
    first, order = bounds.long()[..., None, None], groups.columns[ORDER]
    entry = first + slots + (starts - ends + counts).gather(-1, place)
    pairs = first + order[entry.clamp(0, len(order) - 1)]
    if all_full:
        steps = torch.arange(pairs[..., 0].numel() + 1, dtype=torch.int32, device=pairs.device)
        return pairs.flatten().int(), steps * width
    return _compact(pairs, ends[..., -1:].clamp(max=recall.budget), slots)


def _worth(
    recall: Recall,
    groups: Held,
    query: torch.Tensor,
    num_heads: int,
    row_index: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Returns by what groups are ranked, ``[batch, heads, lists a head, groups]``; of empty ones it says nothing.

    For one query head it is the product with what is noted of the group. Heads that choose together rank by the mean of
    their attention to a pair of the group, were the product of each of its pairs that of the group.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    marked = recall.query_marks(query[:, :, 0].unflatten(1, (num_heads, -1)))
    marks, sizes = (groups.tables[name].unflatten(0, (-1, num_heads)) for name in (MARKS, SIZES))
    if len(marks) == 1:  # all rows read one context, which is not repeated for them
        products = torch.einsum("bhgf,hcf->bhgc", marked, marks[0])
    else:
        marks, sizes = (marks, sizes) if row_index is None else (marks[row_index], sizes[row_index])
        products = marked @ marks.mT
    products = products.to(accumulation_dtype(query.dtype)) * scale
    if recall.per_query_head:
        return products
    sizes = sizes[:, :, None, 1:]
    return (products + sizes.log()).softmax(-1).mean(2, keepdim=True) / sizes.clamp(min=1)


def _by_row(
    bounds: torch.Tensor, sizes: torch.Tensor, num_heads: int, row_index: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where the segments of each batch row begin, and the sizes of their groups."""
    bounds, sizes = bounds.unflatten(0, (-1, num_heads)), sizes.unflatten(0, (-1, num_heads))
    return (bounds, sizes) if row_index is None else (bounds[row_index], sizes[row_index])


def _compact(pairs: torch.Tensor, n_listed: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns lists one behind another, without the slots that short segments leave free; these are written last."""
    ends = n_listed.flatten().cumsum(0)
    bounds = torch.nn.functional.pad(ends, (1, 0))
    place = bounds[:-1].view(n_listed.shape) + slots
    place = torch.where(slots < n_listed, place, pairs.numel())
    index = torch.empty(pairs.numel() + 1, dtype=torch.int32, device=pairs.device)
    index.scatter_(0, place.flatten(), pairs.flatten().int())
    return index, bounds.int()
