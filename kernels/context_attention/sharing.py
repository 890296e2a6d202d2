"""Shares the pairs that a step reads among programs, on the device: no shape depends on a value, nothing waits.

That takes some twenty short launches, once a step for all layers. Contexts are frozen, so unlike ragged attention,
whose tail grows with every layer's step, a list of work stays right.
"""

import torch
from torch import Tensor

from kvzip_press.kernels.context_attention.plan import ContextPlan, Work
from kvzip_press.kernels.context_attention.tuning import Sharing, sharing_for
from kvzip_press.kernels.triton_support import multiprocessors

MIN_ITEM = 64  # fewest pairs that are worth a program
_CHOICES = 16  # lengths of an item of which the shortest that fits is taken


def share(plan: ContextPlan, sharing: Sharing | None = None) -> Work:
    """Returns the work of a plan; ``sharing`` is for tuning, by default it is chosen from the shapes."""
    n_tokens, n_heads = plan.num_tokens, plan.num_key_value_heads
    sharing = sharing or sharing_for(n_tokens, plan.groups)
    tokens_per_tile = max(1, sharing.block_m // plan.groups)
    n_tiles = min(n_tokens, n_tokens // tokens_per_tile + min(plan.begins.shape[1], n_tokens))
    contexts, order = plan.context_of_token.sort(stable=True)
    place = torch.arange(n_tokens, device=contexts.device)
    begins_run = torch.ones_like(contexts, dtype=torch.bool)
    begins_run[1:] = contexts[1:] != contexts[:-1]
    slot = place - torch.where(begins_run, place, 0).cummax(0).values if n_tokens else place
    slot = slot % tokens_per_tile
    tile = (slot == 0).cumsum(0) - 1
    counts = torch.zeros(n_tiles, dtype=torch.int64, device=contexts.device)
    counts.scatter_add_(0, tile, torch.ones_like(tile))
    firsts = counts.cumsum(0) - counts
    tile_contexts = contexts[firsts.clamp(max=max(0, n_tokens - 1))] if n_tiles else contexts
    lengths = torch.where(counts[:, None] > 0, plan.lengths[:, tile_contexts.long()], 0).flatten(1)
    n_blocks = -(-tokens_per_tile * plan.groups // sharing.block_m)
    slots = multiprocessors(contexts.device) * sharing.programs_per_sm
    n_programs = max(n_tiles * n_heads, -(-slots // n_blocks))
    n_items = _items_of(lengths.long(), n_programs)
    ends = n_items.cumsum(1)
    programs = torch.arange(n_programs, device=contexts.device).expand(len(ends), -1).contiguous()
    inverse = torch.empty_like(order).scatter_(0, order, place)
    tensors = {
        "order": order,
        "tile_contexts": tile_contexts,
        "tile_firsts": firsts,
        "tile_counts": counts,
        "token_tiles": tile[inverse],
        "token_slots": slot[inverse],
        "n_items": n_items,
        "first_items": ends - n_items,
        "segments": torch.searchsorted(ends, programs, right=True),
    }
    return Work(
        sharing.block_m, tokens_per_tile, **{name: tensor.int().contiguous() for name, tensor in tensors.items()}
    )


def _items_of(lengths: Tensor, n_programs: int) -> Tensor:
    """Returns each segment's number of items, at most ``n_programs`` in a layer, so that the longest item is short.

    The last length that is tried always fits: with it, each segment has a program to spare for its remainder, or there
    is one program for each.

    Args:
        lengths: int64 [layers, segments].
        n_programs: Programs of a layer, at least one for each segment.
    """
    n_segments = lengths.shape[1]
    total = lengths.sum(1, keepdim=True)
    spare = n_segments * torch.arange(_CHOICES, device=lengths.device) // (_CHOICES - 1)
    pieces = (total + (n_programs - spare).clamp(min=1) - 1) // (n_programs - spare).clamp(min=1)
    pieces = pieces.clamp(min=MIN_ITEM)  # [layers, choices]
    n_items = ((lengths[:, :, None] + pieces[:, None] - 1) // pieces[:, None]).sum(1)
    piece = torch.where(n_items <= n_programs, pieces, total.clamp(min=1)).amin(1, keepdim=True)
    return (lengths + piece - 1) // piece
