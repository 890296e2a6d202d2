"""What one program does with rows of the model's dtype: attention of a block of query rows to its piece of pairs."""

import triton
import triton.language as tl

from kvzip_press.kernels.triton_ops import dot, tanh


@triton.jit
def attend_rows(
    program,
    segment,
    begin,
    n_context,
    n_tail,
    low,
    high,
    q_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    tail_k_ptr,
    tail_v_ptr,
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
    query_length,
    logit_scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes a program's partial results over pairs low .. high - 1 of a segment's context and the tail behind it.

    Row r of a segment is query head r // query_length of its group, token r % query_length. A tile of BLOCK_N pairs is
    entirely context or entirely tail. Every byte of code counts: with a cold cache it is read from memory too.
    """
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
    keys_ptr, values_ptr = k_ptr, v_ptr
    if HAS_INDEX:  # begin and low count listed pairs
        index_ptrs = index_ptr + begin + low + offs_n
    else:
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
    for tile in tl.range(n_tiles, num_stages=STAGES):
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
        offsets = tile_offsets
        if HAS_INDEX:  # each listed pair has a place of its own; the tail's rows follow each other as ever
            tile_offset = tl.cast(0, tl.int64)
            if HAS_TAIL:
                found = tl.load(index_ptrs + row, row + offs_n < tl.where(in_tail, 0, n_left), other=0)
                found = tl.where(in_tail, row + offs_n, found)
            else:
                found = tl.load(index_ptrs + row, mask_n, other=0)
            found = found.to(tl.int64) if WIDE_INDEX else found
            offsets = found[:, None] * HEAD_DIM + offs_d[None, :]
        keys = tl.load(tile_keys_ptr + tile_offset + offsets, mask_tile, other=0.0)
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
        values = tl.load(tile_values_ptr + tile_offset + offsets, mask_tile, other=0.0)
        acc = acc * decay[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        peak = new_peak
    rows = program.to(tl.int64) * n_rows + offs_m
    tl.store(partial_out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], acc, mask_q)
    tl.store(partial_sums_ptr + 2 * rows, peak, mask_m)
    tl.store(partial_sums_ptr + 2 * rows + 1, total, mask_m)
