"""The ranking in plain PyTorch. All shapes are known beforehand, and nothing is read from the device."""

import torch
from torch import Tensor

from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.recall_ranking.inputs import RankingInputs


def recall_ranking(inputs: RankingInputs) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.recall_ranking.recall_ranking`."""
    return listed(inputs, worths(inputs))


def products(inputs: RankingInputs) -> Tensor:
    """Returns the scaled products of queries and groups, fp32 (fp64 for fp64), [batch, num_attention_heads, groups]."""
    dtype, heads = accumulation_dtype(inputs.query.dtype), inputs.num_key_value_heads
    query = inputs.query.to(dtype).unflatten(1, (heads, -1))
    if inputs.has_bounds:
        query = torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)
    marks = inputs.marks.unflatten(0, (-1, heads)).to(dtype)
    if len(marks) == 1:  # all rows read one context, which is not repeated for them
        found = torch.einsum("bhgf,hcf->bhgc", query, marks[0])
    else:
        found = query @ (marks if inputs.row_index is None else marks[inputs.row_index]).mT
    return (found * inputs.scale).flatten(1, 2)


def worths(inputs: RankingInputs) -> Tensor:
    """Returns by what groups are ranked, [batch, num_key_value_heads, lists a head, groups]; of empty ones nothing."""
    found = products(inputs).unflatten(1, (inputs.num_key_value_heads, -1))
    if inputs.per_query_head:
        return found
    sizes = _of_rows(inputs, inputs.sizes)[:, :, None, 1:]
    found = found.masked_fill(sizes == 0, -torch.inf)
    return (found + sizes.log()).softmax(-1).mean(2, keepdim=True) / sizes.clamp(min=1)


def listed(inputs: RankingInputs, worth: Tensor) -> tuple[Tensor, Tensor]:
    """Lists the pairs of the groups that are worth most; see :func:`recall_ranking` for what is returned."""
    device, budget = worth.device, inputs.budget
    sizes = _of_rows(inputs, inputs.sizes).long()[:, :, None].expand(*worth.shape[:3], -1)
    first, sizes = sizes[..., :1], sizes[..., 1:]
    # One bit pattern for each value: CUDA sorts by bits, where a negative NaN comes last and -0 behind 0.
    worth = torch.where(worth.isnan(), torch.nan, worth + 0.0)
    ranked = worth.sort(dim=-1, descending=True, stable=True).indices
    by_rank = sizes.gather(-1, ranked)
    room = budget - first.clamp(max=budget) - (by_rank.cumsum(-1) - by_rank)
    taken = torch.zeros_like(sizes).scatter(-1, ranked, torch.minimum(room.clamp(min=0), by_rank))
    taken, sizes = (torch.cat(both, -1) for both in ((first.clamp(max=budget), taken), (first, sizes)))
    ends, starts = taken.cumsum(-1), sizes.cumsum(-1) - sizes
    slots = torch.arange(budget, device=device).expand(*ends.shape[:3], -1).contiguous()
    place = torch.searchsorted(ends, slots, right=True).clamp(max=inputs.n_groups)
    begin = _of_rows(inputs, inputs.cu_seqlens[:-1]).long()[..., None, None]
    entry = begin + slots + (starts - ends + taken).gather(-1, place)
    order = torch.nn.functional.pad(inputs.order, (0, 1))  # an entry for where there is none
    return _compact(begin + order[entry.clamp(0, len(order) - 1)], ends[..., -1:], slots)


def _of_rows(inputs: RankingInputs, of_segments: Tensor) -> Tensor:
    """Returns what there is for each segment as [batch, num_key_value_heads, ...]."""
    by_row = of_segments.unflatten(0, (-1, inputs.num_key_value_heads))
    return by_row if inputs.row_index is None else by_row[inputs.row_index]


def _compact(pairs: Tensor, n_listed: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Returns lists one behind another, without the slots that short segments leave free; these are written last."""
    bounds = torch.nn.functional.pad(n_listed.flatten().cumsum(0), (1, 0))
    place = bounds[:-1].view(n_listed.shape) + slots
    place = torch.where(slots < n_listed, place, pairs.numel())
    index = torch.empty(pairs.numel() + 1, dtype=torch.int32, device=pairs.device)
    index.scatter_(0, place.flatten(), pairs.flatten().int())
    return index[:-1], bounds.int()
