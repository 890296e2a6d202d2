"""Ragged attention to codes in Triton: bytes become operands of the tensor cores, and no row is ever decoded.

Work is shared out and merged as for rows of the model's dtype (``split.py``); what differs is the loop. Codes are
read as words of 16 bits, and a plane of a word's bits (its low byte, its second nibble) is a tile of numbers for a dot
of its own: with the query's channels of that plane, or into the accumulator of that plane. One or two logical
operations on two words at once make a plane: what remains is a subnormal number of fp16, ``code * 2**-24``, which
tensor cores multiply exactly. Scales are folded into logits and probabilities, and what is added to codes to make them
unsigned is taken off in sums. Products have pairs (or channels) as their rows and queries as their columns, of which
tensor cores take 8 where they take 16 rows. DESIGN.md of kernels gives the reasons.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.ragged_attention import split
from kvzip_press.kernels.ragged_attention.codes.tuning import choose
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.split import gdc_launch_dependents, gdc_wait, items_of, tail_length_of
from kvzip_press.kernels.ragged_attention.tuning import Config
from kvzip_press.kernels.row_codec import CODECS, Codes
from kvzip_press.kernels.triton_ops import HAS_NARROW_DOT, INTERPRETED, dot, tanh

LOG2E = 1.4426950408889634
TINY = tl.constexpr(1e-30)  # in place of a scale of 0, whose logarithm and inverse are asked for
# Instructions on two words of 16 bits at a time: lop3 0x6A is (a & b) ^ c, 0xEA is (a & b) | c.
LOW_BYTE = tl.constexpr("lop3.b32 $0, $1, 0x00FF00FF, 0x00800080, 0x6A;")
HIGH_BYTE = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x00FF00FF, 0x00800080, 0x6A; }")
NIBBLE_0 = tl.constexpr("and.b32 $0, $1, 0x000F000F;")
NIBBLE_1 = tl.constexpr("and.b32 $0, $1, 0x00F000F0;")
NIBBLE_2 = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x000F000F; }")
NIBBLE_3 = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x00F000F0; }")
LOW_FLOAT = tl.constexpr(
    "{ .reg .b32 t, u; shl.b32 t, $1, 8; shr.u32 u, t, 1; and.b32 u, u, 0x3F803F80;"
    " lop3.b32 $0, t, 0x80008000, u, 0xEA; }"
)
HIGH_FLOAT = tl.constexpr(
    "{ .reg .b32 u; shr.u32 u, $1, 1; and.b32 u, u, 0x3F803F80; lop3.b32 $0, $1, 0x80008000, u, 0xEA; }"
)
COLUMNS = 8 if HAS_NARROW_DOT else 16
HEADROOM = tl.constexpr(15.0)  # weights reach 2**15, so that those far below the largest keep their bits in fp16


def ragged_attention(
    inputs: RaggedInputs, *, scaling: float, softcap: float | None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only.

    ``config`` is for tuning; by default it is chosen from the shape.
    """
    query, keys, values, n_heads = inputs.query, inputs.keys, inputs.values, inputs.num_key_value_heads
    assert isinstance(keys, Codes) and isinstance(values, Codes), "see reason_against_triton"
    batch_size, num_attention_heads, query_length, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    groups, n_segments = num_attention_heads // n_heads, batch_size * n_heads
    n_rows = groups * query_length
    key_bits, value_bits = CODECS[keys.codec].bits, CODECS[values.codec].bits
    config = config or choose(n_rows, head_dim, key_bits + value_bits, keys.shape[0], n_segments, COLUMNS)
    n_row_blocks = triton.cdiv(n_rows, config.block_m)
    n_programs = split.n_programs(inputs, config.programs_per_sm, n_row_blocks)
    partial_out = torch.empty(n_programs, n_rows, head_dim, dtype=torch.float32, device=query.device)
    partial_sums = torch.empty(n_programs, n_rows, 2, dtype=torch.float32, device=query.device)
    begins, starts = split.segments_of(inputs)
    tail_keys, tail_values, tail_length = split.tail_of(inputs)
    mask = inputs.tail_mask if inputs.tail_length > 0 else None
    context_query = query if inputs.context_query is None else inputs.context_query
    bias = inputs.context_bias
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
        _attend_codes_kernel[(n_programs, n_row_blocks)](
            context_query,
            query,
            query if bias is None else bias.contiguous(),
            *_words(keys),
            *_words(values),
            begins,
            starts,
            tail_keys,
            tail_values,
            tail_length,
            query if mask is None else mask,
            partial_out,
            partial_sums,
            *context_query.stride()[:3],
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
            K_BITS=key_bits,
            K_FLOAT=keys.codec == "fp8",
            K_BLOCK=_block_of_words(keys),
            V_BITS=value_bits,
            V_FLOAT=values.codec == "fp8",
            V_BLOCK=_block_of_words(values),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SINGLE_TOKEN=query_length == 1,
            HAS_BIAS=bias is not None,
            HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap is not None,
            DOT=tl.float32 if query.dtype == torch.float32 else tl.float16,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shape,
        )
        split.merge(partial_out, partial_sums, starts, tail_length, out, lse, shape)
    return out, lse


def _words(codes: Codes) -> tuple[Tensor, Tensor]:
    """Returns codes as words of 16 bits, and what a row needs beside them as one word: its scale, or scale and zero."""
    scales = codes.scales.contiguous()
    return codes.codes.contiguous().view(torch.int16), scales.view(torch.int32 if scales.ndim == 2 else torch.int16)


def _block_of_words(codes: Codes) -> int:
    """Words of a row, padded to what a dot takes."""
    return max(16, triton.next_power_of_2(codes.head_dim * CODECS[codes.codec].bits // 16))


@triton.jit
def _plane(words, PLANE: tl.constexpr, BITS: tl.constexpr, IS_FLOAT: tl.constexpr, DOT: tl.constexpr):
    """Returns a plane of words of 16 bits as numbers: for integers (code + half of their range) * 2**-24.

    Every second nibble comes out 16 times as large, the 2 bits k of a byte 4**k times, and e4m3 numbers as themselves *
    2**-8.
    """
    if BITS == 2:
        bits = (words >> (8 * (PLANE // 4))) & (3 << (2 * (PLANE % 4)))
    elif INTERPRETED:
        if IS_FLOAT:
            high = words if PLANE else words << 8
            bits = (high & -32768) | ((high >> 1) & 0x3F80)
        elif BITS == 8:
            bits = ((words >> (8 * PLANE)) & 0x00FF) ^ 0x0080
        else:
            bits = (words >> (8 * (PLANE // 2))) & (0x00F0 if PLANE % 2 else 0x000F)
    elif IS_FLOAT:
        bits = _two_at_a_time(words, HIGH_FLOAT if PLANE else LOW_FLOAT)
    elif BITS == 8:
        bits = _two_at_a_time(words, HIGH_BYTE if PLANE else LOW_BYTE)
    elif PLANE < 2:
        bits = _two_at_a_time(words, NIBBLE_1 if PLANE else NIBBLE_0)
    else:
        bits = _two_at_a_time(words, NIBBLE_3 if PLANE == 3 else NIBBLE_2)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(DOT)


@triton.jit
def _two_at_a_time(words, ASM: tl.constexpr):
    """Applies an instruction of 32 bits to two words: Triton by itself takes them one by one."""
    return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def _log2(x):
    """The hardware's logarithm, off by 2**-22: a fifth of the instructions of the exact one."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _channel(offs_w, PLANE: tl.constexpr, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Returns which number of a row is in a plane of a word; see CODECS."""
    A_BYTE: tl.constexpr = 8 // BITS
    return 2 * offs_w + PLANE // A_BYTE + (PLANE % A_BYTE) * (HEAD_DIM // A_BYTE)


@triton.jit
def _query_plane(
    rows_ptr,
    mask_m,
    offs_w,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FACTOR: tl.constexpr,
    DOT: tl.constexpr,
):
    """Returns the query's channels of a plane [words, BLOCK_M], in the dtype of the dot."""
    mask = (offs_w < HEAD_DIM * BITS // 16)[:, None] & mask_m[None, :]
    query = tl.load(rows_ptr[None, :] + _channel(offs_w, PLANE, BITS, HEAD_DIM)[:, None], mask, other=0.0)
    return (query.to(tl.float32) * FACTOR).to(DOT)


@triton.jit
def _scale_of(meta):
    """Returns scales (fp32) from words that hold a bf16 scale, and above it, for nibbles, a bf16 zero."""
    return (meta.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _zero_of(meta):
    return (meta & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _tail_plane(rows_ptr, offs_w, mask_n, PLANE: tl.constexpr, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Returns the channels of a plane of rows of the tail, [rows, words]."""
    mask = mask_n[:, None] & (offs_w < HEAD_DIM * BITS // 16)[None, :]
    return tl.load(rows_ptr[:, None] + _channel(offs_w, PLANE, BITS, HEAD_DIM)[None, :], mask, other=0.0)


@triton.jit
def _store_plane(rows_ptr, out, mask_m, offs_w, PLANE: tl.constexpr, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    mask = (offs_w < HEAD_DIM * BITS // 16)[:, None] & mask_m[None, :]
    tl.store(rows_ptr[None, :] + _channel(offs_w, PLANE, BITS, HEAD_DIM)[:, None], out, mask)


@triton.jit(do_not_specialize=["tail_length", "n_segments", "query_length"])
def _attend_codes_kernel(
    q_ptr,
    tail_q_ptr,
    bias_ptr,
    k_ptr,
    k_meta_ptr,
    v_ptr,
    v_meta_ptr,
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
    stride_tqb,
    stride_tqh,
    stride_tqt,
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
    K_BITS: tl.constexpr,
    K_FLOAT: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BITS: tl.constexpr,
    V_FLOAT: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    TAIL_ON_DEVICE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes attention of a block of query rows of every segment to this program's piece of pairs.

    Row r of a segment is query head r // query_length of its group, token r % query_length. The piece's codes come
    first, then its tokens of the tail; accumulators are planes in both.
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
    q0 = _query_plane(q_rows, mask_m, offs_k, 0, K_BITS, HEAD_DIM, 1.0, DOT)
    q1 = _query_plane(q_rows, mask_m, offs_k, 1, K_BITS, HEAD_DIM, 1.0 if K_BITS == 8 else 0.0625, DOT)
    if K_BITS == 4:
        q2 = _query_plane(q_rows, mask_m, offs_k, 2, K_BITS, HEAD_DIM, 1.0, DOT)
        q3 = _query_plane(q_rows, mask_m, offs_k, 3, K_BITS, HEAD_DIM, 0.0625, DOT)
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
    keys_meta_ptr, values_meta_ptr = k_meta_ptr + context_row + offs_n, v_meta_ptr + context_row + offs_n
    key_offsets = offs_n[:, None] * K_WORDS + offs_k[None, :]
    value_offsets = offs_n[None, :] * V_WORDS + offs_v[:, None]
    n_left = tl.minimum(high, n_context) - low
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
        key_scale, value_scale = _scale_of(key_meta), tl.maximum(_scale_of(value_meta), TINY)
        # A pair's weight times its value's scale is what the dot takes; the peak is that of these products.
        shift = _log2(value_scale)
        inverse = tl.exp2(-shift)
        key_zero = -K_OFFSET * key_scale
        if K_BITS == 4:
            key_zero += _zero_of(key_meta)
        if V_BITS <= 4:
            value_zero = _zero_of(value_meta)
        # The next tile's scales are asked for a tile ahead; codes are by the compiler, several tiles ahead.
        mask_next = row + BLOCK_N + offs_n < n_left
        key_meta = tl.load(keys_meta_ptr + tile + BLOCK_N, mask_next, other=0)
        value_meta = tl.load(values_meta_ptr + tile + BLOCK_N, mask_next, other=0)
        logits = dot(_plane(keys, 0, K_BITS, K_FLOAT, DOT), q0, PRECISION)
        logits += dot(_plane(keys, 1, K_BITS, K_FLOAT, DOT), q1, PRECISION)
        if K_BITS == 4:
            logits += dot(_plane(keys, 2, K_BITS, K_FLOAT, DOT), q2, PRECISION)
            logits += dot(_plane(keys, 3, K_BITS, K_FLOAT, DOT), q3, PRECISION)
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
        acc0 = acc0 * decay[None, :] + dot(_plane(values, 0, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
        acc1 = acc1 * decay[None, :] + dot(_plane(values, 1, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
        if V_BITS <= 4:
            acc2 = acc2 * decay[None, :] + dot(_plane(values, 2, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc3 = acc3 * decay[None, :] + dot(_plane(values, 3, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
        if V_BITS == 2:
            acc4 = acc4 * decay[None, :] + dot(_plane(values, 4, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc5 = acc5 * decay[None, :] + dot(_plane(values, 5, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc6 = acc6 * decay[None, :] + dot(_plane(values, 6, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
            acc7 = acc7 * decay[None, :] + dot(_plane(values, 7, V_BITS, V_FLOAT, DOT), rounded, PRECISION)
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
    if HAS_TAIL:
        TAIL_N: tl.constexpr = 16
        tail_low = tl.maximum(low - n_context, 0)
        n_left_tail = tl.maximum(high - n_context, tail_low) - tail_low
        offs_t = tl.arange(0, TAIL_N)
        offs_d = tl.arange(0, K_BLOCK * 16 // K_BITS)
        tail_keys_ptr = tail_k_ptr + batch * stride_tkb + head * stride_tkh
        tail_values_ptr = tail_v_ptr + batch * stride_tvb + head * stride_tvh
        q_rows = tail_q_ptr + batch * stride_tqb + q_head * stride_tqh + token.to(tl.int64) * stride_tqt
        TAIL: tl.constexpr = tail_q_ptr.dtype.element_ty
        # Token i of the query sees the tail keys up to n_tail - query_length + i.
        n_seen_tail = n_tail - query_length + token + 1 - tail_low
        mask_rows = batch * stride_mb + q_head * stride_mh + token * stride_mq
        for row in range(0, n_left_tail, TAIL_N):
            mask_n = row + offs_t < n_left_tail
            tokens = (tail_low + row + offs_t).to(tl.int64)
            # All loads of a tile first: each waits for memory, and no dot between them lets the next one begin.
            mask_keys = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
            keys = tl.load((tail_keys_ptr + tokens * HEAD_DIM)[:, None] + offs_d[None, :], mask_keys, other=0.0)
            rows_ptr = tail_values_ptr + tokens * HEAD_DIM
            plane0 = _tail_plane(rows_ptr, offs_v, mask_n, 0, V_BITS, HEAD_DIM)
            plane1 = _tail_plane(rows_ptr, offs_v, mask_n, 1, V_BITS, HEAD_DIM)
            if V_BITS <= 4:
                plane2 = _tail_plane(rows_ptr, offs_v, mask_n, 2, V_BITS, HEAD_DIM)
                plane3 = _tail_plane(rows_ptr, offs_v, mask_n, 3, V_BITS, HEAD_DIM)
            if V_BITS == 2:
                plane4 = _tail_plane(rows_ptr, offs_v, mask_n, 4, V_BITS, HEAD_DIM)
                plane5 = _tail_plane(rows_ptr, offs_v, mask_n, 5, V_BITS, HEAD_DIM)
                plane6 = _tail_plane(rows_ptr, offs_v, mask_n, 6, V_BITS, HEAD_DIM)
                plane7 = _tail_plane(rows_ptr, offs_v, mask_n, 7, V_BITS, HEAD_DIM)
            mask_query = (offs_d < HEAD_DIM)[:, None] & mask_m[None, :]
            query = tl.load(q_rows[None, :] + offs_d[:, None], mask_query, other=0.0)
            logits = dot(keys, query, PRECISION)
            logits = logits * logit_scale
            if HAS_SOFTCAP:
                logits = softcap * tanh(logits)
            visible = mask_n[:, None]
            if HAS_MASK:
                allowed_ptr = mask_ptr + mask_rows[None, :] + tokens[:, None] * stride_mt
                visible = tl.load(allowed_ptr, mask_n[:, None] & mask_m[None, :], other=0) != 0
            elif not SINGLE_TOKEN:
                visible = mask_n[:, None] & ((row + offs_t)[:, None] < n_seen_tail[None, :])
            logits = tl.where(visible, logits, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 0))
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            weights = tl.exp2(logits - (base - HEADROOM)[None, :])
            decay = tl.exp2(peak - base)
            peak = new_peak
            total = total * decay + tl.sum(weights, 0)
            weights = weights.to(TAIL)
            acc0 = acc0 * decay[None, :] + dot(tl.trans(plane0), weights, PRECISION)
            acc1 = acc1 * decay[None, :] + dot(tl.trans(plane1), weights, PRECISION)
            if V_BITS <= 4:
                acc2 = acc2 * decay[None, :] + dot(tl.trans(plane2), weights, PRECISION)
                acc3 = acc3 * decay[None, :] + dot(tl.trans(plane3), weights, PRECISION)
            if V_BITS == 2:
                acc4 = acc4 * decay[None, :] + dot(tl.trans(plane4), weights, PRECISION)
                acc5 = acc5 * decay[None, :] + dot(tl.trans(plane5), weights, PRECISION)
                acc6 = acc6 * decay[None, :] + dot(tl.trans(plane6), weights, PRECISION)
                acc7 = acc7 * decay[None, :] + dot(tl.trans(plane7), weights, PRECISION)
    rows = program.to(tl.int64) * n_rows + offs_m
    out_rows = partial_out_ptr + rows * HEAD_DIM
    _store_plane(out_rows, acc0, mask_m, offs_v, 0, V_BITS, HEAD_DIM)
    _store_plane(out_rows, acc1, mask_m, offs_v, 1, V_BITS, HEAD_DIM)
    if V_BITS <= 4:
        _store_plane(out_rows, acc2, mask_m, offs_v, 2, V_BITS, HEAD_DIM)
        _store_plane(out_rows, acc3, mask_m, offs_v, 3, V_BITS, HEAD_DIM)
    if V_BITS == 2:
        _store_plane(out_rows, acc4, mask_m, offs_v, 4, V_BITS, HEAD_DIM)
        _store_plane(out_rows, acc5, mask_m, offs_v, 5, V_BITS, HEAD_DIM)
        _store_plane(out_rows, acc6, mask_m, offs_v, 6, V_BITS, HEAD_DIM)
        _store_plane(out_rows, acc7, mask_m, offs_v, 7, V_BITS, HEAD_DIM)
    tl.store(partial_sums_ptr + 2 * rows, peak - HEADROOM, mask_m)
    tl.store(partial_sums_ptr + 2 * rows + 1, total, mask_m)
