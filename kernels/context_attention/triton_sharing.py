"""Shares the pairs of a step of few tokens in two launches: what ``sharing.py`` computes, to the number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.context_attention.sizes import CHOICES, MIN_ITEM, Sizes
from kvzip_press.kernels.ragged_attention.split import on_device


def shared(plan: ContextPlan, sizes: Sizes, block: int) -> dict[str, Tensor]:
    """Returns the tensors of a plan's work by name.

    Blocks of the kernels depend on ``block`` alone: a step of another number of tokens must not wait for a compiler.

    Args:
        plan: The plan.
        sizes: Its sizes.
        block: A power of two, at least the number of tokens.
    """
    n_layers, n_contexts, n_heads = plan.lengths.shape
    n_tokens, n_tiles, n_segments = plan.num_tokens, sizes.n_tiles, sizes.n_tiles * n_heads

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=plan.lengths.device)

    order, token_tiles, token_slots, places = (numbers(n_tokens) for _ in range(4))
    tile_contexts, tile_firsts, tile_counts = (numbers(n_tiles) for _ in range(3))
    n_items, first_items = (numbers(n_layers, n_segments) for _ in range(2))
    segments = numbers(n_layers, sizes.n_programs)
    with on_device(plan.lengths.device):
        _tiles_kernel[(1,)](
            plan.context_of_token.contiguous(),
            order,
            token_tiles,
            token_slots,
            places,
            tile_contexts,
            tile_firsts,
            tile_counts,
            n_tokens,
            n_tiles,
            sizes.tokens_per_tile,
            BLOCK_T=block,
            BLOCK_J=max(4096 // block, 1),
            num_warps=4,
        )
        _items_kernel[(n_layers,)](
            plan.lengths.contiguous(),
            tile_contexts,
            tile_counts,
            n_items,
            first_items,
            segments,
            n_contexts,
            n_segments,
            sizes.n_programs,
            HEADS=n_heads,
            MIN_ITEM=MIN_ITEM,
            CHOICES=CHOICES,
            BLOCK_S=triton.next_power_of_2(block * n_heads),
            BLOCK_P=triton.next_power_of_2(max(block * n_heads, sizes.n_programs) + 1),
            num_warps=8,
        )
    return {
        "order": order,
        "tile_contexts": tile_contexts,
        "tile_firsts": tile_firsts,
        "tile_counts": tile_counts,
        "token_tiles": token_tiles,
        "token_slots": token_slots,
        "n_items": n_items,
        "first_items": first_items,
        "segments": segments,
    }


@triton.jit(do_not_specialize=["n_tokens", "n_tiles", "tokens_per_tile"])
def _tiles_kernel(
    contexts_ptr,
    order_ptr,
    token_tiles_ptr,
    token_slots_ptr,
    places_ptr,
    tile_contexts_ptr,
    tile_firsts_ptr,
    tile_counts_ptr,
    n_tokens,
    n_tiles,
    tokens_per_tile,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sorts tokens by context and cuts each run into tiles: one program, which compares all tokens with one another."""
    offs_t = tl.arange(0, BLOCK_T)
    mask_t, mask_tiles = offs_t < n_tokens, offs_t < n_tiles
    contexts = tl.load(contexts_ptr + offs_t, mask_t, other=0)
    before = tl.zeros([BLOCK_T], tl.int32)  # tokens of contexts that come before
    slot = tl.zeros([BLOCK_T], tl.int32)  # tokens of the same context that come before
    run = tl.zeros([BLOCK_T], tl.int32)  # tokens of the same context
    for first in range(0, n_tokens, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        mask_j = (offs_j < n_tokens)[None, :]
        others = tl.load(contexts_ptr + offs_j, offs_j < n_tokens, other=0)[None, :]
        same = mask_j & (others == contexts[:, None])
        before += tl.sum((mask_j & (others < contexts[:, None])).to(tl.int32), 1)
        slot += tl.sum((same & (offs_j[None, :] < offs_t[:, None])).to(tl.int32), 1)
        run += tl.sum(same.to(tl.int32), 1)
    place = before + slot
    left = run - slot
    slot %= tokens_per_tile
    tl.store(order_ptr + place, offs_t, mask_t)
    tl.store(token_slots_ptr + offs_t, slot, mask_t)
    tl.store(places_ptr + offs_t, place, mask_t)
    last = tl.max(tl.where(mask_t, contexts, 0), 0)
    tl.store(tile_contexts_ptr + offs_t, last, mask_tiles)
    tl.store(tile_firsts_ptr + offs_t, n_tokens, mask_tiles)
    tl.store(tile_counts_ptr + offs_t, 0, mask_tiles)
    tl.debug_barrier()  # other threads of the program have written what is read now
    tile = tl.zeros([BLOCK_T], tl.int32) - 1
    for first in range(0, n_tokens, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        slots = tl.load(token_slots_ptr + offs_j, offs_j < n_tokens, other=1)[None, :]
        places = tl.load(places_ptr + offs_j, offs_j < n_tokens, other=n_tokens)[None, :]
        tile += tl.sum(((slots == 0) & (places <= place[:, None])).to(tl.int32), 1)
    tl.store(token_tiles_ptr + offs_t, tile, mask_t)
    begins = mask_t & (slot == 0)
    tl.store(tile_contexts_ptr + tile, contexts, begins)
    tl.store(tile_firsts_ptr + tile, place, begins)
    tl.store(tile_counts_ptr + tile, tl.minimum(left, tokens_per_tile), begins)


@triton.jit(do_not_specialize=["n_contexts", "n_segments", "n_programs"])
def _items_kernel(
    lengths_ptr,
    tile_contexts_ptr,
    tile_counts_ptr,
    n_items_ptr,
    first_items_ptr,
    segments_ptr,
    n_contexts,
    n_segments,
    n_programs,
    HEADS: tl.constexpr,
    MIN_ITEM: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Cuts the segments of a layer into items, see ``sharing.py``, and says which program reads which."""
    layer = tl.program_id(0).to(tl.int64)
    offs_s, offs_p = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    mask_s = offs_s < n_segments
    tile, head = offs_s // HEADS, offs_s % HEADS
    is_used = mask_s & (tl.load(tile_counts_ptr + tile, mask_s, other=0) > 0)
    context = tl.load(tile_contexts_ptr + tile, is_used, other=0)
    lengths = tl.load(lengths_ptr + (layer * n_contexts + context) * HEADS + head, is_used, other=0)
    total = tl.sum(lengths.to(tl.int64), 0)  # of tiles, so a context counts as often as it is read
    longest = 2147483647  # lengths fit into 32 bits: so a length that never cuts a segment does
    shortest = tl.minimum(tl.maximum(total, 1), longest).to(tl.int32)
    for choice in range(tl.where(total > 0, CHOICES, 0)):  # none where nobody reads a context: as many items, 0
        slots = tl.maximum(n_programs - n_segments * choice // (CHOICES - 1), 1)
        piece = tl.minimum(tl.maximum((total + slots - 1) // slots, MIN_ITEM), longest).to(tl.int32)
        fits = tl.sum(_pieces(lengths, piece), 0) <= n_programs
        shortest = tl.where(fits, tl.minimum(shortest, piece), shortest)
    n_items = _pieces(lengths, shortest)
    ends = tl.cumsum(n_items, 0)
    places = layer * n_segments + offs_s
    tl.store(n_items_ptr + places, n_items, mask_s)
    tl.store(first_items_ptr + places, ends - n_items, mask_s)
    counts = tl.histogram(tl.where(mask_s, ends, BLOCK_P - 1), BLOCK_P)  # segments that end before each program
    tl.store(segments_ptr + layer * n_programs + offs_p, tl.cumsum(counts, 0), offs_p < n_programs)


@triton.jit
def _pieces(lengths, piece):
    """Returns how many pieces of a length there are; unlike tl.cdiv right up to the largest integer."""
    return tl.where(lengths > 0, (lengths - 1) // piece + 1, 0)
