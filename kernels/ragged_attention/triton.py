"""Ragged attention in Triton: every program streams about the same number of pairs, whatever the heads' lengths.

Every segment (its context, then its tail) is cut into pieces of about the same length, one for each program that the
GPU can hold. A program finds its piece from ``cu_seqlens`` and the length of the tail, both read on the device: no list
of work is made or kept, and a captured graph stays valid while the tail grows. Each program writes a partial result. A
second, small kernel merges those of a segment, in parallel over query rows and slices of head_dim. On Hopper it is
launched early (programmatic dependent launch) and waits on the device. DESIGN.md of kernels gives the reasons.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.ragged_attention import split
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.split import gdc_launch_dependents, gdc_wait, items_of, tail_length_of
from kvzip_press.kernels.ragged_attention.tuning import Config, choose
from kvzip_press.kernels.triton_ops import dot, tanh

LOG2E = 1.4426950408889634


def ragged_attention(
    inputs: RaggedInputs, *, scaling: float, softcap: float | None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only.

    ``config`` is for tuning; by default it is chosen from the shape.
    """
    query, n_heads = inputs.query, inputs.num_key_value_heads
    batch_size, num_attention_heads, query_length, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    groups, n_segments = num_attention_heads // n_heads, batch_size * n_heads
    n_rows = groups * query_length
    config = config or choose(n_rows, head_dim, query.element_size(), inputs.keys.shape[0], n_segments)
    n_row_blocks = triton.cdiv(n_rows, config.block_m)
    n_programs = split.n_programs(inputs, config.programs_per_sm, n_row_blocks)
    partial_out = torch.empty(n_programs, n_rows, head_dim, dtype=torch.float32, device=query.device)
    partial_sums = torch.empty(n_programs, n_rows, 2, dtype=torch.float32, device=query.device)
    begins, starts = split.segments_of(inputs)
    tail_keys, tail_values, tail_length = split.tail_of(inputs)
    mask = inputs.tail_mask if inputs.tail_length > 0 else None
    shape: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_S": triton.next_power_of_2(n_segments),
        "HAS_TAIL": inputs.tail_length > 0,
        "TAIL_ON_DEVICE": isinstance(tail_length, Tensor),
        "USE_PDL": split.uses_pdl(query.device),
    }
    if shape["USE_PDL"]:
        shape["launch_pdl"] = True
    with split.on_device(query.device):
        _attend_kernel[(n_programs, n_row_blocks)](
            query,
            *(packed.contiguous() for packed in inputs.dense),
            begins,
            starts,
            tail_keys,
            tail_values,
            tail_length,
            query if mask is None else mask,
            partial_out,
            partial_sums,
            *query.stride()[:3],
            *tail_keys.stride()[:2],
            *tail_values.stride()[:2],
            *((0, 0, 0, 0) if mask is None else split.broadcast_strides(mask)),
            n_segments,
            query_length,
            scaling * LOG2E if softcap is None else scaling / softcap,
            0.0 if softcap is None else softcap * LOG2E,
            HEADS=n_heads,
            GROUPS=groups,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SINGLE_TOKEN=query_length == 1,
            HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shape,
        )
        split.merge(partial_out, partial_sums, starts, tail_length, out, lse, shape)
    return out, lse


@triton.jit(do_not_specialize=["tail_length", "n_segments", "query_length"])
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    begins_ptr,
    starts_ptr,
    tail_k_ptr,
    tail_v_ptr,
    tail_length,
    mask_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_tkb,
    stride_tkh,
    stride_tvb,
    stride_tvh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mt,
    n_segments,
    query_length,
    logit_scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    TAIL_ON_DEVICE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes attention of a block of query rows of every segment to this program's piece of pairs.

    Row r of a segment is query head r // query_length of its group, token r % query_length. A tile of BLOCK_N pairs is
    entirely context or entirely tail. Every byte of code counts: with a cold cache it is read from memory too.
    """
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    n_tail = tail_length_of(tail_length, HAS_TAIL, TAIL_ON_DEVICE)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < n_segments
    starts = tl.load(starts_ptr + offs_s, mask_s, other=0)
    contexts = tl.load(starts_ptr + offs_s + 1, mask_s, other=0) - starts
    begins = tl.load(begins_ptr + offs_s, mask_s, other=0)
    n_items = items_of(tl.where(mask_s, contexts + n_tail, 0), n_segments, tl.num_programs(0), BLOCK_S)
    items_before = tl.cumsum(n_items, 0) - n_items
    mine = (items_before <= program) & (program < items_before + n_items)
    if tl.sum(mine.to(tl.int32), 0) == 0:
        return
    segment = tl.sum(tl.where(mine, offs_s, 0), 0)
    n_context = tl.sum(tl.where(mine, contexts, 0), 0)
    begin = tl.sum(tl.where(mine, begins, 0), 0)
    item = program - tl.sum(tl.where(mine, items_before, 0), 0)
    piece = tl.cdiv(n_context + n_tail, tl.sum(tl.where(mine, n_items, 0), 0))
    low = item * piece
    high = tl.minimum(low + piece, n_context + n_tail)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    if SINGLE_TOKEN:
        n_rows = GROUPS
        member, token = offs_m, offs_m * 0
    else:
        n_rows = GROUPS * query_length
        member, token = offs_m // query_length, offs_m % query_length
    mask_m = offs_m < n_rows
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    tile_offsets = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
    batch = (segment // HEADS).to(tl.int64)
    head = (segment % HEADS).to(tl.int64)
    q_rows = batch * stride_qb + (head * GROUPS + member) * stride_qh + token.to(tl.int64) * stride_qt
    query = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask_q, other=0.0)
    context_row = (begin + low).to(tl.int64) * HEAD_DIM
    keys_ptr, values_ptr = k_ptr + context_row, v_ptr + context_row
    n_left = tl.minimum(high, n_context) - low
    n_tiles = tl.cdiv(tl.maximum(n_left, 0), BLOCK_N)
    if HAS_TAIL:
        tail_low = tl.maximum(low - n_context, 0)
        n_left_tail = tl.maximum(high - n_context, tail_low) - tail_low
        n_context_tiles = n_tiles
        n_tiles += tl.cdiv(n_left_tail, BLOCK_N)
        tail_row = tail_low.to(tl.int64) * HEAD_DIM
        tail_keys_ptr = tail_k_ptr + batch * stride_tkb + head * stride_tkh + tail_row
        tail_values_ptr = tail_v_ptr + batch * stride_tvb + head * stride_tvh + tail_row
        # Token i of the query sees the tail keys up to n_tail - query_length + i.
        n_seen_tail = n_tail - query_length + token + 1 - tail_low
        mask_rows = batch * stride_mb + (head * GROUPS + member) * stride_mh + token * stride_mq
        mask_ptrs = mask_ptr + mask_rows + tail_low.to(tl.int64) * stride_mt
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(n_tiles):
        row = tile * BLOCK_N
        tile_keys_ptr, tile_values_ptr, n_live = keys_ptr, values_ptr, n_left
        if HAS_TAIL:
            in_tail = tile >= n_context_tiles
            row = tl.where(in_tail, tile - n_context_tiles, tile) * BLOCK_N
            n_live = tl.where(in_tail, n_left_tail, n_left)
            tile_keys_ptr = tl.where(in_tail, tail_keys_ptr, keys_ptr)
            tile_values_ptr = tl.where(in_tail, tail_values_ptr, values_ptr)
        mask_n = row + offs_n < n_live
        mask_tile = mask_n[:, None] if BLOCK_D == HEAD_DIM else mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        # A 64-bit address for the tile and 32-bit offsets in it: 64 bits for every element spill registers.
        tile_offset = tl.cast(row, tl.int64) * HEAD_DIM
        keys = tl.load(tile_keys_ptr + tile_offset + tile_offsets, mask_tile, other=0.0)
        logits = dot(query, tl.trans(keys), PRECISION) * logit_scale
        if HAS_SOFTCAP:
            logits = softcap * tanh(logits)
        visible = mask_n[None, :]
        if HAS_TAIL and (HAS_MASK or not SINGLE_TOKEN):
            context_n = row + offs_n < tl.where(in_tail, 0, n_left)
            tail_n = row + offs_n < tl.where(in_tail, n_left_tail, 0)
            if HAS_MASK:
                rows = (row + offs_n).to(tl.int64) * stride_mt
                allowed = tl.load(mask_ptrs[:, None] + rows[None, :], mask_m[:, None] & tail_n[None, :], other=0)
                visible = context_n[None, :] | (allowed != 0)
            else:
                seen = (row + offs_n)[None, :] < n_seen_tail[:, None]
                visible = context_n[None, :] | (tail_n[None, :] & seen)
        logits = tl.where(visible, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = new_peak
        if HAS_TAIL and (HAS_MASK or not SINGLE_TOKEN):  # else every row sees a pair of every tile
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        values = tl.load(tile_values_ptr + tile_offset + tile_offsets, mask_tile, other=0.0)
        acc = acc * decay[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        peak = new_peak
    rows = program.to(tl.int64) * n_rows + offs_m
    tl.store(partial_out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], acc, mask_q)
    tl.store(partial_sums_ptr + 2 * rows, peak, mask_m)
    tl.store(partial_sums_ptr + 2 * rows + 1, total, mask_m)
