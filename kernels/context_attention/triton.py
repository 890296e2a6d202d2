"""Attention to a pool of contexts in Triton: programs share the pairs evenly, and each pair meets a tile of tokens.

The work list of the plan (``sharing.py``) says which segment a program reads; the items of a segment are equal parts
of it. Each program writes a partial result, and a second kernel merges those of a token's query heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.context_attention.tuning import Loop, loop_for
from kvzip_press.kernels.context_attention.turn import Turn
from kvzip_press.kernels.ragged_attention.split import early_launch, gdc_launch_dependents, gdc_wait, on_device
from kvzip_press.kernels.row_codec import Codes
from kvzip_press.kernels.triton_ops import dot, logit_factors, padded, tanh

LN2 = tl.constexpr(0.6931471805599453)
MANY_MERGED = 512  # heads of tokens; a program of the merge kernel for each of more takes long to begin, work or none
MERGED_AT_ONCE = 4096  # numbers of partial results that a program of the merge kernel asks for at once


def context_attention(
    query: Tensor,
    keys: Tensor | Codes,
    values: Tensor | Codes,
    plan: ContextPlan,
    layer_idx: int,
    *,
    scaling: float,
    softcap: float | None,
    turn: Turn | None = None,
    tail: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    return_lse: bool = True,
    loop: Loop | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kvzip_press.kernels.context_attention.context_attention`; for supported inputs only.

    ``loop`` is for tuning; by default it is chosen from the shape.
    """
    work = plan.work
    assert work is not None and plan.begins.is_contiguous() and plan.lengths.is_contiguous(), "see plan_contexts"
    n_tokens, n_heads, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    has_codes = isinstance(keys, Codes)
    key_rows, key_scales = (keys.codes, keys.scales) if isinstance(keys, Codes) else (keys, query)
    value_rows, value_scales = (values.codes, values.scales) if isinstance(values, Codes) else (values, query)
    cos, sin = (query, query) if turn is None else (turn.cos.contiguous(), turn.sin.contiguous())
    tail_out, tail_lse = (query, query[..., 0]) if tail is None else tail
    loop = loop or loop_for(work.block_m, head_dim, query.element_size(), has_codes=has_codes)
    n_rows, n_programs = work.tokens_per_tile * plan.groups, work.segments.shape[1]
    merged_heads = plan.groups if n_tokens * n_heads > MANY_MERGED else 1
    block_h, block_d = triton.next_power_of_2(merged_heads), triton.next_power_of_2(head_dim)
    partial_out = torch.empty(n_programs, n_rows, head_dim, dtype=torch.float32, device=query.device)
    partial_sums = torch.empty(n_programs, n_rows, 2, dtype=torch.float32, device=query.device)
    # Both kernels read the plan before they wait. A launch that is not early begins when all that came before it on its
    # stream has ended, the plan's kernels too; what comes behind it there, early or not, begins no sooner than it does.
    early = early_launch(query.device)
    not_early = {name: value for name, value in early.items() if name != "launch_pdl"}
    with on_device(query.device):
        reader = _reader(query.device)
        _attend_kernel[(n_programs, triton.cdiv(n_rows, work.block_m))](
            query,
            cos,
            sin,
            key_rows,
            key_scales,
            value_rows,
            value_scales,
            plan.begins[layer_idx],
            plan.lengths[layer_idx],
            work.order,
            work.tile_contexts,
            work.tile_firsts,
            work.tile_counts,
            work.segments[layer_idx],
            work.first_items[layer_idx],
            work.n_items[layer_idx],
            partial_out,
            partial_sums,
            *query.stride()[:2],
            work.n_items.shape[1],
            n_rows,
            *logit_factors(scaling, softcap),
            HEADS=plan.num_key_value_heads,
            GROUPS=plan.groups,
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            BLOCK_M=work.block_m,
            BLOCK_N=loop.block_n,
            HAS_CODES=has_codes,
            TURNED=0 if turn is None else turn.num_pairs,
            NEIGHBOURS=turn is not None and turn.layout == "neighbours",
            HAS_SOFTCAP=softcap is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=loop.num_warps,
            num_stages=loop.num_stages,
            **(early if reader in work.read_on else not_early),
        )
        work.read_on.add(reader)
        _merge_kernel[(n_tokens, n_heads // merged_heads)](
            partial_out,
            partial_sums,
            work.token_tiles,
            work.token_slots,
            work.first_items[layer_idx],
            work.n_items[layer_idx],
            tail_out,
            tail_lse,
            out,
            out if lse is None else lse,
            *tail_out.stride()[:2],
            *tail_lse.stride(),
            *out.stride()[:2],
            n_rows,
            HAS_TAIL=tail is not None,
            IN_PLACE=tail is not None and tail_out is out,
            HAS_LSE=lse is not None,
            HEADS=plan.num_key_value_heads,
            GROUPS=plan.groups,
            HEAD_DIM=head_dim,
            MERGED_HEADS=merged_heads,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            AT_ONCE=min(8, max(1, MERGED_AT_ONCE // (block_h * block_d))),
            num_warps=min(4, max(1, block_h * block_d // 128)),
            **early,
        )
    return out, lse


def _reader(device: torch.device) -> tuple[int, bool]:
    """Returns on which stream what is launched now runs, and whether it is captured, as ``Work.read_on`` has it."""
    if device.type != "cuda":  # Triton's interpreter
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


@triton.jit(do_not_specialize=["n_segments", "n_rows"])
def _attend_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    k_ptr,
    k_scales_ptr,
    v_ptr,
    v_scales_ptr,
    begins_ptr,
    lengths_ptr,
    order_ptr,
    tile_contexts_ptr,
    tile_firsts_ptr,
    tile_counts_ptr,
    segments_ptr,
    first_items_ptr,
    n_items_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    stride_qt,
    stride_qh,
    n_segments,
    n_rows,
    logit_scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_CODES: tl.constexpr,
    TURNED: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Computes attention of a block of a tile's query rows to this program's item of a segment.

    With TURNED pairs of channels, queries are turned first. Codes of 8 bits become numbers of the query's dtype.

    Row r of a tile is token r // GROUPS of the tile, query head r % GROUPS of the group. Every row sees every pair.

    It begins before what came before has ended. Until it waits for that, it reads only the plan, whose kernels have
    ended (see the launch). No program ends without having waited: the merge kernel waits for this one alone, and this
    one ends when its programs have.
    """
    if USE_PDL:  # the merge kernel begins once all programs of this one have begun, so it takes the room of none
        gdc_launch_dependents()
    program = tl.program_id(0)
    segment = tl.load(segments_ptr + program)
    tile, head = segment // HEADS, segment % HEADS
    n_live_rows = tl.load(tile_counts_ptr + tile, segment < n_segments, other=0) * GROUPS
    first_row = tl.program_id(1) * BLOCK_M
    if first_row >= n_live_rows:
        if USE_PDL:
            gdc_wait()
        return
    place = tl.load(tile_contexts_ptr + tile) * HEADS + head
    length = tl.load(lengths_ptr + place)
    piece = tl.cdiv(length, tl.load(n_items_ptr + segment))
    low = (program - tl.load(first_items_ptr + segment)) * piece
    n_left = tl.minimum(low + piece, length) - low
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_live_rows
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    tokens = tl.load(order_ptr + tl.load(tile_firsts_ptr + tile) + offs_m // GROUPS, mask_m, other=0).to(tl.int64)
    first_pair = (tl.load(begins_ptr + place) + low).to(tl.int64)
    if USE_PDL:
        gdc_wait()
    q_rows = tokens * stride_qt + (head * GROUPS + offs_m % GROUPS) * stride_qh
    query = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask_q, other=0.0)
    if TURNED > 0:
        is_turned = offs_d < 2 * TURNED
        if NEIGHBOURS:
            partner, angle, is_first = offs_d ^ 1, offs_d // 2, offs_d % 2 == 0
        else:
            partner = tl.where(offs_d < TURNED, offs_d + TURNED, offs_d - TURNED)
            angle, is_first = offs_d % TURNED, offs_d < TURNED
        mask_turn = mask_m[:, None] & is_turned[None, :]
        other = tl.load(q_ptr + q_rows[:, None] + partner[None, :], mask_turn, other=0.0).to(tl.float32)
        angles = tokens[:, None] * TURNED + angle[None, :]
        cos = tl.load(cos_ptr + angles, mask_turn, other=1.0)
        sin = tl.load(sin_ptr + angles, mask_turn, other=0.0)
        sin = tl.where(is_first[None, :], -sin, sin)
        query = (query.to(tl.float32) * cos + other * sin).to(query.dtype)
    k_scales_ptr += first_pair
    v_scales_ptr += first_pair
    keys_ptr, values_ptr = k_ptr + first_pair * HEAD_DIM, v_ptr + first_pair * HEAD_DIM
    tile_offsets = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for row in range(0, n_left, BLOCK_N):
        mask_n = row + offs_n < n_left
        mask_tile = mask_n[:, None] if BLOCK_D == HEAD_DIM else mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        # A 64-bit address for the tile and 32-bit offsets in it: 64 bits for every element spill registers.
        tile_offset = tl.cast(row, tl.int64) * HEAD_DIM
        if HAS_CODES:  # 8 bits fit into the dtype of the query; scales are folded into logits and weights
            keys = tl.load(keys_ptr + tile_offset + tile_offsets, mask_tile, other=0).to(tl.float32).to(query.dtype)
            scales = tl.load(k_scales_ptr + row + offs_n, mask_n, other=0.0).to(tl.float32)
            logits = dot(query, tl.trans(keys), PRECISION) * (scales * logit_scale)[None, :]
        else:
            keys = tl.load(keys_ptr + tile_offset + tile_offsets, mask_tile, other=0.0)
            logits = dot(query, tl.trans(keys), PRECISION) * logit_scale
        if HAS_SOFTCAP:
            logits = softcap * tanh(logits)
        logits = tl.where(mask_n[None, :], logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))  # finite: every row sees a pair of every tile
        weights = tl.exp2(logits - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        if HAS_CODES:
            values = tl.load(values_ptr + tile_offset + tile_offsets, mask_tile, other=0).to(tl.float32).to(query.dtype)
            weights *= tl.load(v_scales_ptr + row + offs_n, mask_n, other=0.0).to(tl.float32)[None, :]
        else:
            values = tl.load(values_ptr + tile_offset + tile_offsets, mask_tile, other=0.0)
        acc = acc * decay[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        peak = new_peak
    rows = program.to(tl.int64) * n_rows + offs_m
    tl.store(partial_out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], acc, mask_q)
    tl.store(partial_sums_ptr + 2 * rows, peak, mask_m)
    tl.store(partial_sums_ptr + 2 * rows + 1, total, mask_m)


@triton.jit(do_not_specialize=["n_rows", "stride_lt", "stride_lh"])
def _merge_kernel(
    partial_out_ptr,
    partial_sums_ptr,
    token_tiles_ptr,
    token_slots_ptr,
    first_items_ptr,
    n_items_ptr,
    tail_ptr,
    tail_lse_ptr,
    out_ptr,
    lse_ptr,
    stride_tt,
    stride_th,
    stride_lt,
    stride_lh,
    stride_ot,
    stride_oh,
    n_rows,
    HAS_TAIL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MERGED_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Merges the partial results of a token's query heads, and their tails'; without any, gives 0 and -inf.

    A program merges one head, or all of a group, which have the same parts. Numbers of heads are [heads, 1], so that
    no warp waits for another.

    The tail is read before the result is written, which may be in its place: then nothing is to do without parts, and
    nothing is even read where no log-sum-exp is wanted.
    """
    token, first_head = tl.program_id(0), tl.program_id(1) * MERGED_HEADS
    segment = tl.load(token_tiles_ptr + token) * HEADS + first_head // GROUPS
    first_row = tl.load(token_slots_ptr + token) * GROUPS + first_head % GROUPS
    first, n_parts = tl.load(first_items_ptr + segment), tl.load(n_items_ptr + segment)
    if USE_PDL:  # also if nothing is to do: what follows waits for this kernel alone; before, only the plan is read
        gdc_wait()
    place = token.to(tl.int64)
    offs_h, offs_d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask_h = offs_h < MERGED_HEADS
    mask = mask_h & (offs_d < HEAD_DIM)
    query_heads = first_head + offs_h
    lse_ptrs = lse_ptr + place * (HEADS * GROUPS) + query_heads
    out_ptrs = out_ptr + place * stride_ot + query_heads * stride_oh + offs_d
    tail_lse_ptrs = tail_lse_ptr + place * stride_lt + query_heads * stride_lh
    if IN_PLACE and n_parts == 0:
        if HAS_LSE:
            tail_lse = tl.load(tail_lse_ptrs, mask_h, other=0.0)
            tl.store(lse_ptrs, tail_lse, mask_h)
            zeros = tl.zeros([BLOCK_H, BLOCK_D], out_ptr.dtype.element_ty)
            tl.store(out_ptrs, zeros, mask & (tail_lse == -float("inf")))
        return
    if MERGED_HEADS == 1:
        peak, total, acc = _parts_of_head(
            partial_out_ptr, partial_sums_ptr, first, n_parts, first_row, n_rows, HEAD_DIM, BLOCK_D, AT_ONCE
        )
    else:
        peak, total, acc = _parts_of_heads(
            partial_out_ptr,
            partial_sums_ptr,
            first,
            n_parts,
            first_row,
            n_rows,
            MERGED_HEADS,
            HEAD_DIM,
            BLOCK_H,
            BLOCK_D,
            AT_ONCE,
        )
    if HAS_TAIL:
        tail_peak = tl.load(tail_lse_ptrs, mask_h, other=-float("inf")) / LN2
        tail_ptrs = tail_ptr + place * stride_tt + query_heads * stride_th + offs_d
        tail = tl.load(tail_ptrs, mask, other=0.0)
        peak, total, acc = _with_part(peak, total, acc, tail_peak, 1.0, tail.to(tl.float32))
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask)
    if HAS_LSE:
        tl.store(lse_ptrs, tl.where(total > 0, (peak + tl.log2(total)) * LN2, -float("inf")), mask_h)


@triton.jit
def _with_part(peak, total, acc, part_peak, part_total, part_out):
    """Merges one more part of each head; a head may have neither this one nor any before it."""
    new_peak = tl.maximum(peak, part_peak)
    finite_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weight, decay = tl.exp2(part_peak - finite_peak), tl.exp2(peak - finite_peak)
    return new_peak, total * decay + weight * part_total, acc * decay + weight * part_out


@triton.jit
def _parts_of_head(
    partial_out_ptr,
    partial_sums_ptr,
    first,
    n_parts,
    first_row,
    n_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merges the parts of one head, BLOCK_P at a time: its peak and total, [1, 1], and their sum, [1, BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)
    peak = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for part in range(0, n_parts, BLOCK_P):
        offs_p = part + tl.arange(0, BLOCK_P)
        mask_p = offs_p < n_parts
        rows = (first + offs_p).to(tl.int64) * n_rows + first_row
        peaks = tl.load(partial_sums_ptr + 2 * rows, mask_p, other=-float("inf"))
        totals = tl.load(partial_sums_ptr + 2 * rows + 1, mask_p, other=0.0)
        mask = mask_p[:, None] & (offs_d < HEAD_DIM)[None, :]
        outs = tl.load(partial_out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))  # finite: every part has seen a pair
        weights = tl.exp2(peaks - new_peak)
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights * totals, 0)
        acc = acc * decay + tl.sum(weights[:, None] * outs, 0)
        peak = new_peak
    one = tl.zeros([1, 1], tl.float32)
    return one + peak, one + total, acc[None, :]


@triton.jit
def _parts_of_heads(
    partial_out_ptr,
    partial_sums_ptr,
    first,
    n_parts,
    first_row,
    n_rows,
    MERGED_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Merges the parts of several heads, one after the other: peaks and totals, [BLOCK_H, 1], sums, [BLOCK_H, BLOCK_D].

    Nothing is [parts, heads, channels], so that no warp waits for another.
    """
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_h = tl.arange(0, BLOCK_H)[:, None]
    peak = tl.full([BLOCK_H, 1], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H, 1], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for begin in range(0, n_parts, UNROLL):
        for step in tl.static_range(UNROLL):
            part = begin + step
            rows = (first + part).to(tl.int64) * n_rows + first_row + offs_h
            mask_h = offs_h < tl.where(part < n_parts, MERGED_HEADS, 0)
            part_peak = tl.load(partial_sums_ptr + 2 * rows, mask_h, other=-float("inf"))
            part_total = tl.load(partial_sums_ptr + 2 * rows + 1, mask_h, other=0.0)
            part_out = tl.load(partial_out_ptr + rows * HEAD_DIM + offs_d, mask_h & (offs_d < HEAD_DIM), other=0.0)
            peak, total, acc = _with_part(peak, total, acc, part_peak, part_total, part_out)
    return peak, total, acc
