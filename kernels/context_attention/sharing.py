"""Shares the pairs that a step reads among programs, on the device: no shape depends on a value, nothing waits.

For few tokens, as steps that write have, that takes two launches (``triton_sharing.py``), for many some forty, once a
step for all layers. Contexts are frozen, so unlike ragged attention, whose tail grows with every layer's step, a list
of work stays right.
"""

import torch
from torch import Tensor

from kvzip_press.kernels.context_attention.plan import ContextPlan, Work
from kvzip_press.kernels.context_attention.sizes import CHOICES, MIN_ITEM, Sizes
from kvzip_press.kernels.context_attention.tuning import Sharing, sharing_for
from kvzip_press.kernels.triton_support import reason_against_triton

_FEW_TOKENS = 64  # that one program compares with one another; for 512 that took five times as long as the many steps
_MOST_SEGMENTS = 4096  # of a layer, which one program cuts


def share(plan: ContextPlan, sharing: Sharing | None = None) -> Work:
    """Returns the work of a plan; ``sharing`` is for tuning, by default it is chosen from the shapes."""
    sharing = sharing or sharing_for(plan.num_tokens, plan.groups)
    sizes = Sizes.of(plan, sharing)
    is_small = 0 < plan.num_tokens <= _FEW_TOKENS and _FEW_TOKENS * plan.num_key_value_heads <= _MOST_SEGMENTS
    if is_small and reason_against_triton(plan.begins.device) is None:
        from kvzip_press.kernels.context_attention.triton_sharing import shared

        tensors = shared(plan, sizes, _FEW_TOKENS)
    else:
        tensors = shared_by_steps(plan, sizes)
    return Work(sharing.block_m, sizes.tokens_per_tile, **tensors)


def shared_by_steps(plan: ContextPlan, sizes: Sizes) -> dict[str, Tensor]:
    """Returns the tensors of a plan's work by name, computed by PyTorch: for any number of tokens, on any device."""
    contexts, order = plan.context_of_token.sort(stable=True)
    n_tokens, n_tiles, device = plan.num_tokens, sizes.n_tiles, contexts.device
    place = torch.arange(n_tokens, device=device)
    begins_run = torch.ones_like(contexts, dtype=torch.bool)
    begins_run[1:] = contexts[1:] != contexts[:-1]
    slot = place - torch.where(begins_run, place, 0).cummax(0).values if n_tokens else place
    slot = slot % sizes.tokens_per_tile
    tile = (slot == 0).cumsum(0) - 1
    counts = torch.zeros(n_tiles, dtype=torch.int64, device=device)
    counts.scatter_add_(0, tile, torch.ones_like(tile))
    firsts = counts.cumsum(0) - counts
    tile_contexts = contexts[firsts.clamp(max=max(0, n_tokens - 1))] if n_tiles else contexts
    lengths = torch.where(counts[:, None] > 0, plan.lengths[:, tile_contexts.long()], 0).flatten(1)
    n_items = _items_of(lengths.long(), sizes.n_programs)
    ends = n_items.cumsum(1)
    programs = torch.arange(sizes.n_programs, device=device).expand(len(ends), -1).contiguous()
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
    return {name: tensor.int().contiguous() for name, tensor in tensors.items()}


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
    spare = n_segments * torch.arange(CHOICES, device=lengths.device) // (CHOICES - 1)
    pieces = (total + (n_programs - spare).clamp(min=1) - 1) // (n_programs - spare).clamp(min=1)
    pieces = pieces.clamp(min=MIN_ITEM)  # [layers, choices]
    n_items = ((lengths[:, :, None] + pieces[:, None] - 1) // pieces[:, None]).sum(1)
    piece = torch.where(n_items <= n_programs, pieces, total.clamp(min=1)).amin(1, keepdim=True)
    return (lengths + piece - 1) // piece
