"""What one program does with codes: attention of a block of query rows to its piece of pairs, none of them decoded.

Codes are read as words of 16 bits, and a plane of a word's bits (``triton_planes.py``) is a tile of numbers for a dot
of its own: with the query's channels of that plane, or into the accumulator of that plane. Scales are folded into
logits and probabilities, and what is added to codes to make them unsigned is taken off in sums. Keys whose channels
have scales are the exception: a tile of them, a plane at a time, becomes numbers in registers. Products have pairs (or
channels) as their rows and queries as their columns, of which tensor cores take 8 where they take 16 rows.
"""

import triton
import triton.language as tl

from kvzip_press.kernels.ragged_attention.codes.triton_planes import (
    channel,
    log2,
    plane_of,
    query_plane,
    scale_of,
    store_plane,
    zero_of,
)
from kvzip_press.kernels.triton_ops import dot, tanh

TINY = tl.constexpr(1e-30)  # in place of a scale of 0, whose logarithm and inverse are asked for
HEADROOM = tl.constexpr(15.0)  # weights reach 2**15, so that those far below the largest keep their bits in fp16


@triton.jit
def rows_of(
    words,
    group,
    meta_ptr,
    mask_n,
    offs_w,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns a plane of words as the numbers that they stand for, with the scales and zeros of their groups' channels.

    These are words of 32 bits [groups, HEAD_DIM], a scale below and a zero above.
    """
    UNIT: tl.constexpr = 16777216.0 / (1 << (BITS * (PLANE % (8 // BITS)) % 8))
    where = group[:, None] * HEAD_DIM + channel(offs_w, PLANE, BITS, HEAD_DIM)[None, :]
    meta = tl.load(meta_ptr + where, mask_n[:, None] & (offs_w < HEAD_DIM * BITS // 16)[None, :], other=0)
    code = plane_of(words, PLANE, BITS, False, tl.float32) * UNIT - (1 << (BITS - 1))
    return (code * scale_of(meta) + zero_of(meta)).to(DTYPE)


@triton.jit
def attend_codes(
    program,
    segment,
    begin,
    low,
    high,
    q_ptr,
    bias_ptr,
    k_ptr,
    k_meta_ptr,
    k_group_ptr,
    v_ptr,
    v_meta_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    query_length,
    logit_scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    K_FLOAT: tl.constexpr,
    K_GROUPED: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BITS: tl.constexpr,
    V_FLOAT: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes a program's partial results over pairs low .. high - 1 of the list that begins at ``begin``.

    Row r of a segment is query head r // query_length of its group, token r % query_length.
    """
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k, offs_v = tl.arange(0, K_BLOCK), tl.arange(0, V_BLOCK)
    K_WORDS: tl.constexpr = HEAD_DIM * K_BITS // 16
    V_WORDS: tl.constexpr = HEAD_DIM * V_BITS // 16
    if SINGLE_TOKEN:
        n_rows = GROUPS
        member, token = offs_m, offs_m * 0
    else:
        n_rows = GROUPS * query_length
        member, token = offs_m // query_length, offs_m % query_length
    mask_m = offs_m < n_rows
    batch = (segment // HEADS).to(tl.int64)
    head = (segment % HEADS).to(tl.int64)
    q_head = head * GROUPS + member
    q_rows = q_ptr + batch * stride_qb + q_head * stride_qh + token.to(tl.int64) * stride_qt
    if K_GROUPED:  # keys become numbers of the query's dtype, a plane at a time
        Q: tl.constexpr = q_ptr.dtype.element_ty
        q0 = query_plane(q_rows, mask_m, offs_k, 0, K_BITS, HEAD_DIM, 1.0, Q)
        q1 = query_plane(q_rows, mask_m, offs_k, 1, K_BITS, HEAD_DIM, 1.0, Q)
        q2 = query_plane(q_rows, mask_m, offs_k, 2, K_BITS, HEAD_DIM, 1.0, Q)
        q3 = query_plane(q_rows, mask_m, offs_k, 3, K_BITS, HEAD_DIM, 1.0, Q)
        if K_BITS == 2:
            q4 = query_plane(q_rows, mask_m, offs_k, 4, K_BITS, HEAD_DIM, 1.0, Q)
            q5 = query_plane(q_rows, mask_m, offs_k, 5, K_BITS, HEAD_DIM, 1.0, Q)
            q6 = query_plane(q_rows, mask_m, offs_k, 6, K_BITS, HEAD_DIM, 1.0, Q)
            q7 = query_plane(q_rows, mask_m, offs_k, 7, K_BITS, HEAD_DIM, 1.0, Q)
    else:
        q0 = query_plane(q_rows, mask_m, offs_k, 0, K_BITS, HEAD_DIM, 1.0, DOT)
        q1 = query_plane(q_rows, mask_m, offs_k, 1, K_BITS, HEAD_DIM, 1.0 if K_BITS == 8 else 0.0625, DOT)
        if K_BITS == 4:
            q2 = query_plane(q_rows, mask_m, offs_k, 2, K_BITS, HEAD_DIM, 1.0, DOT)
            q3 = query_plane(q_rows, mask_m, offs_k, 3, K_BITS, HEAD_DIM, 0.0625, DOT)
            q_sum = tl.sum(q0.to(tl.float32) + q2.to(tl.float32), 0)
            q_sum += 16.0 * tl.sum(q1.to(tl.float32) + q3.to(tl.float32), 0)
        else:
            q_sum = tl.sum(q0.to(tl.float32) + q1.to(tl.float32), 0)
    # The logit of a pair: scale * (dot of codes) + zero * (sum of the query) + bias.
    K_FACTOR: tl.constexpr = 256.0 if K_FLOAT else 16777216.0
    K_OFFSET: tl.constexpr = 0.0 if K_FLOAT else (128.0 if K_BITS == 8 else 8.0)
    V_FACTOR: tl.constexpr = 256.0 if V_FLOAT else 16777216.0
    V_OFFSET: tl.constexpr = 0.0 if V_FLOAT else (128.0 if V_BITS == 8 else (8.0 if V_BITS == 4 else 2.0))
    if HAS_BIAS:
        bias_rows = (batch * HEADS * GROUPS + q_head) * query_length + token
        bias = tl.load(bias_ptr + bias_rows, mask_m, other=0.0) * logit_scale
    context_row = (begin + low).to(tl.int64)
    keys_ptr, values_ptr = k_ptr + context_row * K_WORDS, v_ptr + context_row * V_WORDS
    values_meta_ptr = v_meta_ptr + context_row + offs_n
    keys_meta_ptr = (k_group_ptr if K_GROUPED else k_meta_ptr) + context_row + offs_n  # a row's group, or its scale
    key_offsets = offs_n[:, None] * K_WORDS + offs_k[None, :]
    value_offsets = offs_n[None, :] * V_WORDS + offs_v[:, None]
    n_left = high - low
    acc0 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
    acc1 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
    if V_BITS <= 4:
        acc2 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
        acc3 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
    if V_BITS == 2:
        acc4 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
        acc5 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
        acc6 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
        acc7 = tl.zeros([V_BLOCK, BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    # Sums over pairs stay apart, pair by pair of a tile, until the loop is done: each would cost an exchange of warps.
    totals = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    offsets = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    key_meta = tl.load(keys_meta_ptr, offs_n < n_left, other=0)
    value_meta = tl.load(values_meta_ptr, offs_n < n_left, other=0)
    for row in range(0, n_left, BLOCK_N):
        mask_n = row + offs_n < n_left
        mask_k = mask_n[:, None] if K_BLOCK == K_WORDS else mask_n[:, None] & (offs_k < K_WORDS)[None, :]
        mask_v = mask_n[None, :] if V_BLOCK == V_WORDS else mask_n[None, :] & (offs_v < V_WORDS)[:, None]
        tile = tl.cast(row, tl.int64)
        keys = tl.load(keys_ptr + tile * K_WORDS + key_offsets, mask_k, other=0)
        values = tl.load(values_ptr + tile * V_WORDS + value_offsets, mask_v, other=0)
        value_scale = tl.maximum(scale_of(value_meta), TINY)
        # A pair's weight times its value's scale is what the dot takes; the peak is that of these products.
        shift = log2(value_scale)
        inverse = tl.exp2(-shift)
        if K_GROUPED:
            group = key_meta.to(tl.int64)
        else:
            key_scale = scale_of(key_meta)
            key_zero = -K_OFFSET * key_scale
            if K_BITS == 4:
                key_zero += zero_of(key_meta)
        if V_BITS <= 4:
            value_zero = zero_of(value_meta)
        # The next tile's scales are asked for a tile ahead; codes are by the compiler, several tiles ahead.
        mask_next = row + BLOCK_N + offs_n < n_left
        key_meta = tl.load(keys_meta_ptr + tile + BLOCK_N, mask_next, other=0)
        value_meta = tl.load(values_meta_ptr + tile + BLOCK_N, mask_next, other=0)
        if K_GROUPED:
            logits = dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 0, K_BITS, HEAD_DIM, Q), q0, PRECISION)
            logits += dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 1, K_BITS, HEAD_DIM, Q), q1, PRECISION)
            logits += dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 2, K_BITS, HEAD_DIM, Q), q2, PRECISION)
            logits += dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 3, K_BITS, HEAD_DIM, Q), q3, PRECISION)
            if K_BITS == 2:
                logits += dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 4, K_BITS, HEAD_DIM, Q), q4, PRECISION)
                logits += dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 5, K_BITS, HEAD_DIM, Q), q5, PRECISION)
                logits += dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 6, K_BITS, HEAD_DIM, Q), q6, PRECISION)
                logits += dot(rows_of(keys, group, k_meta_ptr, mask_n, offs_k, 7, K_BITS, HEAD_DIM, Q), q7, PRECISION)
            logits = logits * logit_scale
        else:
            logits = dot(plane_of(keys, 0, K_BITS, K_FLOAT, DOT), q0, PRECISION)
            logits += dot(plane_of(keys, 1, K_BITS, K_FLOAT, DOT), q1, PRECISION)
            if K_BITS == 4:
                logits += dot(plane_of(keys, 2, K_BITS, K_FLOAT, DOT), q2, PRECISION)
                logits += dot(plane_of(keys, 3, K_BITS, K_FLOAT, DOT), q3, PRECISION)
            logits = logits * (key_scale * (K_FACTOR * logit_scale))[:, None]
            if not K_FLOAT:
                logits += q_sum[None, :] * (key_zero * logit_scale)[:, None]
        if HAS_BIAS:
            logits += bias[None, :]
        if HAS_SOFTCAP:
            logits = softcap * tanh(logits)
        logits = tl.where(mask_n[:, None], logits + shift[:, None], -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 0))
        weights = tl.exp2(logits - (new_peak - HEADROOM)[None, :])
        decay = tl.exp2(peak - new_peak)
        peak = new_peak
        rounded = weights.to(DOT)
        weights = weights * inverse[:, None]
        totals = totals * decay[None, :] + weights
        if not V_FLOAT:
            offsets = offsets * decay[None, :] - V_OFFSET * rounded.to(tl.float32)
        if V_BITS <= 4:
            offsets += weights * value_zero[:, None]
        acc0 = acc0 * decay[None, :] + dot(plane_of(values, 0, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
        acc1 = acc1 * decay[None, :] + dot(plane_of(values, 1, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
        if V_BITS <= 4:
            acc2 = acc2 * decay[None, :] + dot(plane_of(values, 2, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc3 = acc3 * decay[None, :] + dot(plane_of(values, 3, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
        if V_BITS == 2:
            acc4 = acc4 * decay[None, :] + dot(plane_of(values, 4, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc5 = acc5 * decay[None, :] + dot(plane_of(values, 5, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc6 = acc6 * decay[None, :] + dot(plane_of(values, 6, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc7 = acc7 * decay[None, :] + dot(plane_of(values, 7, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
    total = tl.sum(totals, 0)
    offset = tl.sum(offsets, 0)[None, :]
    acc0 = acc0 * V_FACTOR + offset
    acc1 = acc1 * (V_FACTOR if V_BITS == 8 else (V_FACTOR / 16 if V_BITS == 4 else V_FACTOR / 4)) + offset
    if V_BITS <= 4:
        acc2 = acc2 * (V_FACTOR if V_BITS == 4 else V_FACTOR / 16) + offset
        acc3 = acc3 * (V_FACTOR / 16 if V_BITS == 4 else V_FACTOR / 64) + offset
    if V_BITS == 2:
        acc4 = acc4 * V_FACTOR + offset
        acc5 = acc5 * (V_FACTOR / 4) + offset
        acc6 = acc6 * (V_FACTOR / 16) + offset
        acc7 = acc7 * (V_FACTOR / 64) + offset
    rows = program.to(tl.int64) * n_rows + offs_m
    out_rows = partial_out_ptr + rows * HEAD_DIM
    store_plane(out_rows, acc0, mask_m, offs_v, 0, V_BITS, HEAD_DIM)
    store_plane(out_rows, acc1, mask_m, offs_v, 1, V_BITS, HEAD_DIM)
    if V_BITS <= 4:
        store_plane(out_rows, acc2, mask_m, offs_v, 2, V_BITS, HEAD_DIM)
        store_plane(out_rows, acc3, mask_m, offs_v, 3, V_BITS, HEAD_DIM)
    if V_BITS == 2:
        store_plane(out_rows, acc4, mask_m, offs_v, 4, V_BITS, HEAD_DIM)
        store_plane(out_rows, acc5, mask_m, offs_v, 5, V_BITS, HEAD_DIM)
        store_plane(out_rows, acc6, mask_m, offs_v, 6, V_BITS, HEAD_DIM)
        store_plane(out_rows, acc7, mask_m, offs_v, 7, V_BITS, HEAD_DIM)
    tl.store(partial_sums_ptr + 2 * rows, peak - HEADROOM, mask_m)
    tl.store(partial_sums_ptr + 2 * rows + 1, total, mask_m)
