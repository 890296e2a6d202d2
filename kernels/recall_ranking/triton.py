"""The ranking in Triton: one launch for the products of queries and groups, one that ranks and lists.

The second has a program for each list. It holds all groups of its segment in registers and never sorts them: the bits
of a worth, turned so that integers have the order of the numbers, are found two at a time, from the highest, such that
the groups from there on fill the budget. Groups above that worth are listed whole, those that are equal to it in their
order until the budget is full; so a list does not depend on how many programs or threads there are. Where a listed
group begins, the distance from its place in the list to its place in the order of pairs is written, which only grows
from group to group: a running maximum then spreads it over the group's pairs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.ragged_attention.split import early_launch, gdc_launch_dependents, gdc_wait, on_device
from kvzip_press.kernels.recall_ranking.inputs import RankingInputs
from kvzip_press.kernels.triton_ops import dot, padded

TILE = 4096  # most numbers of the marks that a program holds at a time
LIST_TILE = 2048  # most pairs that are listed at a time
GROUPS_PER_THREAD = 4  # until a program has 16 warps


def recall_ranking(inputs: RankingInputs) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.recall_ranking.recall_ranking`; for supported inputs only."""
    names = ["sizes", "order", "cu_seqlens", *([] if inputs.row_index is None else ["row_index"])]
    # Before the first launch: the second one reads some of it before it waits.
    inputs = replace(inputs, **{name: getattr(inputs, name).contiguous() for name in names})
    return listed(inputs, products(inputs))


def products(inputs: RankingInputs) -> Tensor:
    """Returns the scaled products of queries and groups, fp32 [batch, num_attention_heads, groups]."""
    query, marks, heads = inputs.query, inputs.marks, inputs.num_key_value_heads
    batch_size, num_attention_heads, head_dim = query.shape
    out = torch.empty(*query.shape[:2], inputs.n_groups, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    block_d = padded(head_dim)
    block_c = max(16, TILE // (block_d * (2 if inputs.has_bounds else 1)))
    with on_device(query.device):
        _products_kernel[(triton.cdiv(inputs.n_groups, block_c), batch_size * heads)](
            query,
            marks,
            _row_index(inputs),
            out,
            *query.stride()[:2],
            *marks.stride()[:2],
            inputs.n_groups,
            inputs.scale,
            HEADS=heads,
            MEMBERS=num_attention_heads // heads,
            HEAD_DIM=head_dim,
            HAS_BOUNDS=inputs.has_bounds,
            HAS_ROWS=inputs.row_index is not None,
            BLOCK_M=max(16, triton.next_power_of_2(num_attention_heads // heads)),
            BLOCK_C=block_c,
            BLOCK_D=block_d,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=4,
            **early_launch(query.device),
        )
    return out


def listed(inputs: RankingInputs, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks groups by the products of :func:`products`, and lists the pairs of the best; all tensors are contiguous."""
    query, heads = inputs.query, inputs.num_key_value_heads
    n_lists, budget = inputs.n_lists, inputs.budget
    index, scratch = (torch.empty(n_lists * budget, dtype=torch.int32, device=query.device) for _ in range(2))
    if n_lists == 0:
        return index, torch.zeros(1, dtype=torch.int32, device=query.device)
    bounds = torch.empty(n_lists + 1, dtype=torch.int32, device=query.device)
    block_c = max(32, triton.next_power_of_2(inputs.n_groups))
    with on_device(query.device):
        _list_kernel[(n_lists,)](
            logits,
            inputs.sizes,
            inputs.order,
            inputs.cu_seqlens,
            _row_index(inputs),
            scratch,
            index,
            bounds,
            inputs.n_groups,
            budget,
            query.shape[0] * heads,
            HEADS=heads,
            LISTS=inputs.lists_per_head,
            MEMBERS=query.shape[1] // heads // inputs.lists_per_head,
            TOGETHER=not inputs.per_query_head,
            HAS_ROWS=inputs.row_index is not None,
            BLOCK_C=block_c,
            BLOCK_B=min(LIST_TILE, max(32, triton.next_power_of_2(budget))),
            BLOCK_S=triton.next_power_of_2(query.shape[0] * heads),
            num_warps=min(16, max(4, block_c // (32 * GROUPS_PER_THREAD))),
            **early_launch(query.device),
        )
    return index, bounds


def _row_index(inputs: RankingInputs) -> Tensor:
    """Returns which packed row a row reads, or a stand-in that is never read."""
    return inputs.cu_seqlens if inputs.row_index is None else inputs.row_index


@triton.jit(do_not_specialize=["n_groups"])
def _products_kernel(
    q_ptr,
    marks_ptr,
    row_index_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    stride_ms,
    stride_mc,
    n_groups,
    scale,
    HEADS: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Multiplies the queries of one row and key-value head with the marks of a block of groups."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    packed_row = tl.load(row_index_ptr + row) if HAS_ROWS else row.to(tl.int64)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_c, mask_m, mask_d = offs_c < n_groups, offs_m < MEMBERS, offs_d < HEAD_DIM
    mask = mask_c[:, None] & mask_d[None, :]
    marks_ptr += (packed_row * HEADS + head) * stride_ms
    places = (offs_c.to(tl.int64) * stride_mc)[:, None] + offs_d[None, :]
    marks = tl.load(marks_ptr + places, mask, other=0.0)
    query_heads = head * MEMBERS + offs_m
    q_rows = row.to(tl.int64) * stride_qb + query_heads.to(tl.int64) * stride_qh
    query = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask_m[:, None] & mask_d[None, :], other=0.0)
    if HAS_BOUNDS:
        least = tl.load(marks_ptr + places + HEAD_DIM, mask, other=0.0)
        rises, nothing = query.to(tl.float32) > 0, tl.zeros_like(query)
        product = dot(tl.where(rises, query, nothing), tl.trans(marks), PRECISION)
        product += dot(tl.where(rises, nothing, query), tl.trans(least), PRECISION)
    else:
        product = dot(query, tl.trans(marks), PRECISION)
    out_rows = row.to(tl.int64) * (HEADS * MEMBERS) + query_heads
    tl.store(
        out_ptr + out_rows[:, None] * n_groups + offs_c[None, :], product * scale, mask_m[:, None] & mask_c[None, :]
    )


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _ordered(x):
    """Returns unsigned integers that are in the order of fp32 numbers: -0 is 0, and NaN is above all."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 0, bits)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, bits)
    turned = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return turned.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _expected_together(logits_ptr, sizes, n_groups, mask_c, offs_c, MEMBERS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the mean over query heads of the attention that each expects of a pair of each group."""
    log_sizes = tl.log(tl.maximum(sizes, 1).to(tl.float32))
    worth = tl.zeros([BLOCK_C], tl.float32)
    for member in range(MEMBERS):
        logits = tl.load(logits_ptr + member * n_groups + offs_c, mask_c, other=0.0)
        logits = tl.where(sizes > 0, logits + log_sizes, -float("inf"))
        peak = tl.max(logits, 0)
        weights = tl.exp(logits - tl.where(peak == -float("inf"), 0.0, peak))
        total = tl.sum(weights, 0)
        worth += weights / tl.where(total == 0.0, 1.0, total)  # 0: there are no groups
    return worth / MEMBERS / tl.maximum(sizes, 1).to(tl.float32)


@triton.jit(do_not_specialize=["n_groups", "budget", "n_segments"])
def _list_kernel(
    logits_ptr,
    sizes_ptr,
    order_ptr,
    starts_ptr,
    row_index_ptr,
    scratch_ptr,
    index_ptr,
    bounds_ptr,
    n_groups,
    budget,
    n_segments,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOGETHER: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Makes the list of one head: that of a key-value head, or of a query head."""
    program = tl.program_id(0)
    own = program // LISTS  # its segment, counted over the batch
    offs_s, offs_c, offs_b = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_B)
    mask_s, mask_c = offs_s < n_segments, offs_c < n_groups
    segments = offs_s
    if HAS_ROWS:
        segments = (tl.load(row_index_ptr + offs_s // HEADS, mask_s, other=0) * HEADS).to(tl.int32) + offs_s % HEADS
    starts = tl.load(starts_ptr + segments, mask_s, other=0)
    n_listed = tl.minimum(tl.load(starts_ptr + segments + 1, mask_s, other=0) - starts, budget)
    begin = tl.sum(tl.where(offs_s == own, starts, 0), 0).to(tl.int64)
    segment = tl.sum(tl.where(offs_s == own, segments, 0), 0).to(tl.int64)
    n_own = tl.sum(tl.where(offs_s == own, n_listed, 0), 0)
    bound = tl.sum(tl.where(offs_s < own, n_listed, 0), 0) * LISTS + program % LISTS * n_own
    sizes_ptr += segment * (n_groups + 1)
    n_first = tl.minimum(tl.load(sizes_ptr), budget)
    sizes = tl.load(sizes_ptr + 1 + offs_c, mask_c, other=0)
    if USE_PDL:  # what is read above was there before the products were
        gdc_wait()
        gdc_launch_dependents()
    tl.store(bounds_ptr + program, bound)
    if program == tl.num_programs(0) - 1:
        tl.store(bounds_ptr + program + 1, bound + n_own)
    scratch_ptr += program.to(tl.int64) * budget
    for tile in range(0, budget, BLOCK_B):
        tl.store(scratch_ptr + tile + offs_b, tl.zeros([BLOCK_B], tl.int32), tile + offs_b < budget)
    logits_ptr += program.to(tl.int64) * MEMBERS * n_groups
    if TOGETHER:
        worth = _expected_together(logits_ptr, sizes, n_groups, mask_c, offs_c, MEMBERS, BLOCK_C)
    else:
        worth = tl.load(logits_ptr + offs_c, mask_c, other=0.0)
    rank = _ordered(worth)
    room = budget - n_first
    least = tl.full([], 0, tl.uint32)  # the largest number such that groups from there on fill the room
    unit = tl.full([], 1 << 30, tl.uint32)  # two bits at a time
    for _ in range(16):
        found = (tl.sum(tl.where(rank >= least + unit, sizes, 0), 0) >= room).to(tl.uint32)
        found += (tl.sum(tl.where(rank >= least + 2 * unit, sizes, 0), 0) >= room).to(tl.uint32)
        found += (tl.sum(tl.where(rank >= least + 3 * unit, sizes, 0), 0) >= room).to(tl.uint32)
        least += found * unit
        unit = unit >> 2
    better, equal = tl.where(rank > least, sizes, 0), tl.where(rank == least, sizes, 0)
    left = tl.maximum(room - tl.sum(better, 0), 0)
    better_before, equal_before = tl.cumsum(better, 0) - better, tl.cumsum(equal, 0) - equal
    place = better_before + tl.minimum(equal_before, left)  # in the list, behind the first tokens
    taken = better + tl.minimum(equal_before + equal, left) - tl.minimum(equal_before, left)
    distance = tl.cumsum(sizes, 0) - sizes - place
    tl.debug_barrier()  # the zeros are there
    tl.store(scratch_ptr + n_first + place, distance, taken > 0)
    tl.debug_barrier()
    reached = 0
    for tile in range(0, n_own, BLOCK_B):
        slots = tile + offs_b
        mask_b = slots < n_own
        found = tl.associative_scan(tl.load(scratch_ptr + slots, mask_b, other=0), 0, _larger)
        found = tl.maximum(found, reached)
        reached = tl.max(found, 0)
        pairs = tl.load(order_ptr + begin + slots + found, mask_b, other=0)
        tl.store(index_ptr + bound.to(tl.int64) + slots, begin.to(tl.int32) + pairs, mask_b)
