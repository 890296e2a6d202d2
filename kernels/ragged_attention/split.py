"""How ragged attention's kernels share pairs among programs, and merge the programs' partial results.

A segment is what a (batch row, key-value head) reads: one list of pairs for each form in which its pairs are stored.
The first list ends with the tail. Lists are cut into pieces, one for each program, and the pieces of a segment, of
whichever list, are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.triton_support import interpreting, multiprocessors

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_PDL = True
except ImportError:  # an older Triton; the names are only in branches that are never compiled
    gdc_launch_dependents = gdc_wait = None
    HAS_PDL = False

__all__ = [
    "MAX_LISTS",
    "Lists",
    "broadcast_strides",
    "early_launch",
    "gdc_launch_dependents",
    "gdc_wait",
    "merge",
    "n_programs",
    "on_device",
    "piece_of",
    "segments_of",
    "tail_length_of",
    "tail_of",
]

MAX_LISTS = 3  # that a segment may have

LN2 = tl.constexpr(0.6931471805599453)
MIN_PIECE = tl.constexpr(32)  # fewest pairs that are worth a program
LONG_PIECE = 1024  # pairs; what a program needs beside them is little then
MAX_ROUNDS = 4  # of programs: more are too short for codes, which take a third of the time


@dataclass(frozen=True)
class Lists:
    """Where the lists of all segments lie.

    Attributes:
        bounds: Begins and starts of each list of a segment that is of pairs; see :func:`segments_of`.
        n_segments: Number of segments.
        tail: What :func:`tail_of` gives.
        tail_alone: Whether the tail is a list of its own, before those; else it is the end of the first of them.
    """

    bounds: Sequence[tuple[Tensor, Tensor]]
    n_segments: int
    tail: tuple[Tensor, Tensor, Tensor | int]
    tail_alone: bool = False

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Begins and starts of ``MAX_LISTS`` lists in turn, for a kernel: what it never reads is there twice."""
        places = [self.bounds[0], *self.bounds] if self.tail_alone else [*self.bounds]
        return tuple(x for place in places + places[:1] * (MAX_LISTS - len(places)) for x in place)

    def shape(self, head_dim: int, device: torch.device, *, has_tail: bool) -> dict[str, Any]:
        """Returns the arguments that a kernel has in common with the one that merges its partial results."""
        n_lists = len(self.bounds) + self.tail_alone
        return {
            "HEAD_DIM": head_dim,
            "LISTS": n_lists,
            "TAIL_ALONE": self.tail_alone,
            "BLOCK_S": triton.next_power_of_2(self.n_segments * n_lists),
            "HAS_TAIL": has_tail,
            "TAIL_ON_DEVICE": isinstance(self.tail[2], Tensor),
            **early_launch(device),
        }


def n_programs(parts: Sequence[RaggedInputs], n_lists: int, programs_per_sm: int, n_row_blocks: int) -> int:
    """Returns how many programs share the pairs: at least one for each list, and as many as are resident at once.

    Where those would have long pieces, there are several times as many: pieces of a segment differ by up to a half, and
    with several rounds of them the last one to end is not far behind the others.
    """
    slots = triton.cdiv(multiprocessors(parts[0].query.device) * programs_per_sm, n_row_blocks)
    n_pairs = sum(0 if part.part_of_storage else part.n_pairs for part in parts)
    rounds = n_pairs // (slots * LONG_PIECE)
    return max(n_lists, slots * min(max(rounds, 1), MAX_ROUNDS))


def segments_of(inputs: RaggedInputs) -> tuple[Tensor, Tensor]:
    """Returns where each segment of the batch begins in the packed context, and in the contexts put end to end.

    The two differ if batch rows share packed rows.
    """
    if inputs.row_index is None:
        return inputs.cu_seqlens, inputs.cu_seqlens
    n_heads = inputs.num_key_value_heads
    index = (inputs.row_index.unsqueeze(-1) * n_heads + torch.arange(n_heads, device=inputs.row_index.device)).flatten()
    lengths = inputs.cu_seqlens.diff()[index]
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return inputs.cu_seqlens[index], starts


def tail_of(inputs: RaggedInputs) -> tuple[Tensor, Tensor, Tensor | int]:
    """Returns keys, values and length of the tail, or stand-ins that are never read if there is none.

    A head's tokens must be contiguous; those of a cache are, others are copied.
    """
    if inputs.tail_keys is None or inputs.tail_values is None or inputs.tail_length == 0:
        return inputs.query, inputs.query, 0
    length = inputs.tail_length if inputs.live_tail_length is None else inputs.live_tail_length
    head_dim = inputs.query.shape[-1]
    dense = (x if x.stride(2) == head_dim else x.contiguous() for x in (inputs.tail_keys, inputs.tail_values))
    return *dense, length  # type: ignore[return-value]  # two of them


def broadcast_strides(mask: Tensor) -> tuple[int, ...]:
    """Returns the strides of a mask, with 0 in dimensions of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def early_launch(device: torch.device) -> dict[str, Any]:
    """Returns the arguments of a launch that may begin while the one before it ends, if this GPU can do that."""
    can = HAS_PDL and not interpreting() and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"USE_PDL": True, "launch_pdl": True} if can else {"USE_PDL": False}


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes ``device`` the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def merge(
    partial_out: Tensor, partial_sums: Tensor, lists: Lists, out: Tensor, lse: Tensor, shape: dict[str, Any]
) -> None:
    """Merges the partial results of all programs into ``out`` and ``lse``.

    Args:
        partial_out: fp32 [programs, rows of a segment, head_dim], not yet divided by the totals.
        partial_sums: fp32 [programs, rows of a segment, 2], the exponent (base 2) that a program took off, and its
            total.
        lists: what the programs have shared.
        out: [batch, heads, query_length, head_dim], contiguous.
        lse: [batch, heads, query_length], contiguous.
        shape: what ``lists.shape`` gave.
    """
    n_programs, n_rows, head_dim = partial_out.shape
    # Few rows are cut into slices of head_dim, so that the partial results are read by many programs at once.
    block_d = min(triton.next_power_of_2(head_dim), 32 if lists.n_segments * n_rows <= 128 else 128)
    _merge_kernel[(lists.n_segments, n_rows, triton.cdiv(head_dim, block_d))](
        partial_out,
        partial_sums,
        *lists.arguments[1::2],
        lists.tail[2],
        out,
        lse,
        lists.n_segments,
        n_rows,
        n_programs,
        BLOCK_D=block_d,
        BLOCK_P=min(64, max(4, triton.next_power_of_2(2 * n_programs // lists.n_segments))),
        num_warps=2,
        **shape,
    )


@triton.jit
def tail_length_of(tail_length, HAS_TAIL: tl.constexpr, TAIL_ON_DEVICE: tl.constexpr):
    """Returns the tail's number of tokens, from an argument that is a number or points to one."""
    if not HAS_TAIL:
        return 0
    elif TAIL_ON_DEVICE:
        return tl.load(tail_length)
    else:
        return tail_length


@triton.jit
def items_of(lengths, n_lists, n_programs, BLOCK_S: tl.constexpr):
    """Returns each list's number of pieces [BLOCK_S], at most n_programs in all, to make the longest piece short.

    Of 16 lengths of a piece (fewer if there are very many lists) the shortest that fits is taken. The last one always
    fits: with it, each list has a program to spare for its remainder, or there is one program for each.
    """
    N_CHOICES: tl.constexpr = 16 if BLOCK_S <= 256 else (8 if BLOCK_S <= 512 else 2)
    total = tl.sum(lengths, 0)
    spare = (n_lists * tl.arange(0, N_CHOICES)) // (N_CHOICES - 1)
    pieces = tl.maximum(tl.cdiv(total, tl.maximum(n_programs - spare, 1)), MIN_PIECE)
    n_items = tl.sum((lengths[:, None] + pieces[None, :] - 1) // pieces[None, :], 0)
    piece = tl.min(tl.where(n_items <= n_programs, pieces, tl.maximum(total, 1)), 0)
    return (lengths + piece - 1) // piece


@triton.jit
def _stretches(begins_ptr, starts_ptr, segments, mask):
    """Returns where lists begin and how long they are; 0 and 0 where ``mask`` is not."""
    starts = tl.load(starts_ptr + segments, mask, other=0)
    return tl.load(begins_ptr + segments, mask, other=0), tl.load(starts_ptr + segments + 1, mask, other=0) - starts


@triton.jit
def _lists_of(
    begins_0,
    starts_0,
    begins_1,
    starts_1,
    begins_2,
    starts_2,
    n_tail,
    n_segments,
    LISTS: tl.constexpr,
    TAIL_ALONE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Returns where each list begins and how long it is: list l is number l % LISTS of segment l // LISTS."""
    offs = tl.arange(0, BLOCK_S)
    mask = offs < n_segments * LISTS
    segments, number = offs // LISTS, offs % LISTS
    begins, lengths = _stretches(begins_0, starts_0, segments, mask & (number == 0) & (not TAIL_ALONE))
    lengths = tl.where(mask & (number == 0), lengths + n_tail, 0)
    if LISTS > 1:
        more_begins, more = _stretches(begins_1, starts_1, segments, mask & (number == 1))
        begins, lengths = begins + more_begins, lengths + more
    if LISTS > 2:
        more_begins, more = _stretches(begins_2, starts_2, segments, mask & (number == 2))
        begins, lengths = begins + more_begins, lengths + more
    return begins, lengths


@triton.jit
def piece_of(
    program,
    begins_0,
    starts_0,
    begins_1,
    starts_1,
    begins_2,
    starts_2,
    n_tail,
    n_segments,
    LISTS: tl.constexpr,
    TAIL_ALONE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Returns a program's list, where that begins, its length, the stretch [low, high) of it, and its number of pieces.

    That number is 0 for a program that has nothing to do; the rest means nothing then.
    """
    begins, lengths = _lists_of(
        begins_0, starts_0, begins_1, starts_1, begins_2, starts_2, n_tail, n_segments, LISTS, TAIL_ALONE, BLOCK_S
    )
    n_items = items_of(lengths, n_segments * LISTS, tl.num_programs(0), BLOCK_S)
    items_before = tl.cumsum(n_items, 0) - n_items
    mine = (items_before <= program) & (program < items_before + n_items)
    found = tl.sum(tl.where(mine, tl.arange(0, BLOCK_S), 0), 0)
    begin = tl.sum(tl.where(mine, begins, 0), 0)
    length = tl.sum(tl.where(mine, lengths, 0), 0)
    n_mine = tl.sum(tl.where(mine, n_items, 0), 0)
    piece = tl.cdiv(length, tl.maximum(n_mine, 1))
    low = (program - tl.sum(tl.where(mine, items_before, 0), 0)) * piece
    return found, begin, length, low, tl.minimum(low + piece, length), n_mine


@triton.jit(do_not_specialize=["tail_length", "n_segments", "n_rows", "n_programs"])
def _merge_kernel(
    partial_out_ptr,
    partial_sums_ptr,
    starts_0,
    starts_1,
    starts_2,
    tail_length,
    out_ptr,
    lse_ptr,
    n_segments,
    n_rows,
    n_programs,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LISTS: tl.constexpr,
    TAIL_ALONE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    TAIL_ON_DEVICE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Merges the partial results of a segment's query row, for a slice of head_dim; without any, gives 0 and -inf."""
    segment, row = tl.program_id(0), tl.program_id(1)
    n_tail = tail_length_of(tail_length, HAS_TAIL, TAIL_ON_DEVICE)
    segments = tl.arange(0, BLOCK_S) // LISTS
    _, lengths = _lists_of(
        starts_0, starts_0, starts_1, starts_1, starts_2, starts_2, n_tail, n_segments, LISTS, TAIL_ALONE, BLOCK_S
    )
    n_items = items_of(lengths, n_segments * LISTS, n_programs, BLOCK_S)
    first = tl.sum(tl.where(segments < segment, n_items, 0), 0)
    n_parts = tl.sum(tl.where(segments == segment, n_items, 0), 0)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    peak = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()  # not earlier: the next kernel's programs would take the room of this one's
    for part in range(0, n_parts, BLOCK_P):
        offs_p = part + tl.arange(0, BLOCK_P)
        mask_p = offs_p < n_parts
        rows = (first + offs_p).to(tl.int64) * n_rows + row
        peaks = tl.load(partial_sums_ptr + 2 * rows, mask_p, other=-float("inf"))
        totals = tl.load(partial_sums_ptr + 2 * rows + 1, mask_p, other=0.0)
        mask = mask_p[:, None] & mask_d[None, :]
        outs = tl.load(partial_out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(peaks - base)
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights * totals, 0)
        acc = acc * decay + tl.sum(weights[:, None] * outs, 0)
        peak = new_peak
    acc = acc / tl.where(total > 0, total, 1.0)
    out_row = segment.to(tl.int64) * n_rows + row
    tl.store(out_ptr + out_row * HEAD_DIM + offs_d, acc.to(out_ptr.dtype.element_ty), mask_d)
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + out_row, tl.where(total > 0, (peak + tl.log2(total)) * LN2, -float("inf")))
