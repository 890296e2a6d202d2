"""Packing by one kernel that moves the rows of columns: each pair knows where it goes, and only kept ones are read.

The destinations are one int32 a source pair, -1 for a pair to drop, made once by a cumulative sum; a launch moves up to
four columns. Nothing of the size of a wide column is allocated but the result.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from kvzip_press.kernels.ragged_pack.bits import BITS
from kvzip_press.kernels.ragged_pack.indices import cumulated, spread
from kvzip_press.kernels.ragged_pack.packed import Packed

_BLOCK_BYTES = 1 << 14  # what a program holds at a time: 64 rows of 128 numbers of 16 bits
_COLUMNS = (
    4  # of a launch: keys, values, positions and scores; on a GPU the launches of a pack take longer than its bytes
)
_MOST_ROWS = 1024  # of a narrow column, 8 for a thread: more would leave too few programs for a short cache


def pack(columns: Sequence[Tensor], keep: Tensor) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.pack`."""
    packed = _fresh(columns, cumulated(keep.sum(-1).flatten()))
    _scatter(columns, _destinations(keep, 0), packed)
    return packed


def merge(
    context: Packed,
    tail: Sequence[Tensor],
    keep_tail: Tensor,
    keep_context: Tensor | None,
    total_kept: int | None = None,
) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.merge`."""
    columns = [column[None, None] for column in context.columns]  # one segment of a dense cache
    total = columns[0].shape[2]
    keep = keep_tail.new_ones(total) if keep_context is None else keep_context
    old, new = context.cu_seqlens.long(), cumulated(keep_tail.sum(-1).flatten())
    kept = cumulated(keep)[old]
    packed = _fresh(tail, kept + new, total_kept)
    # Before a segment's context lie the tails of earlier segments too, before its tail the contexts up to its own.
    _scatter(columns, _destinations(keep, spread(new[:-1], old.diff(), total)), packed)
    _scatter(tail, _destinations(keep_tail, kept[1:].view(*keep_tail.shape[:2], 1)), packed)
    return packed


def _fresh(columns: Sequence[Tensor], bounds: Tensor, total: int | None = None) -> Packed:
    """Storage for as many pairs as ``bounds`` end with; reading that number, if need be, is the one wait."""
    total = int(bounds[-1]) if total is None else total
    return Packed(tuple(column.new_empty(total, *column.shape[3:]) for column in columns), bounds.to(torch.int32))


def _destinations(keep: Tensor, shift: Tensor | int) -> Tensor:
    """Int32 in the shape of ``keep``: how many kept pairs come before each kept one, plus ``shift``; -1 if dropped."""
    numbers = keep.flatten().to(torch.int32).cumsum_(0).sub_(1).view(keep.shape)
    return numbers.add_(shift).masked_fill_(~keep, -1)


def _scatter(columns: Sequence[Tensor], destinations: Tensor, packed: Packed) -> None:
    """Moves the pairs of [batch, heads, length(, dim)] views whose destination is not negative to that row."""
    moved = [
        (rows_as_bits(column), out)
        for column, out in zip(columns, packed.columns, strict=True)
        if column.numel() and out.numel()
    ]
    with torch.cuda.device_of(destinations):  # Triton launches on the current device
        for start in range(0, len(moved), _COLUMNS):
            _move(moved[start : start + _COLUMNS], destinations)


def _move(columns: Sequence[tuple[Tensor, Tensor]], destinations: Tensor) -> None:
    """Moves the rows of up to `_COLUMNS` columns in one launch; each is given with its contiguous result."""
    batch_size, num_heads, length = columns[0][0].shape[:3]
    block_n = min(block_rows(rows) for rows, _ in columns)
    n_blocks = triton.cdiv(length, block_n)
    slots: list[Tensor | int] = []
    dims: dict[str, int] = {}
    for number in range(_COLUMNS):
        is_there = number < len(columns)
        rows, out = columns[number if is_there else 0]  # a column stands in where there is none, and is not read
        slots += [rows, out.view(rows.dtype), *rows.stride()[:3]]
        dims[f"DIM_{number}"] = dim = rows.shape[3] if is_there else 0
        dims[f"BLOCK_{number}"] = triton.next_power_of_2(max(1, dim))
    grid = (batch_size * num_heads * n_blocks,)
    _move_kernel[grid](destinations, num_heads, length, n_blocks, *slots, **dims, BLOCK_N=block_n)


def rows_as_bits(column: Tensor) -> Tensor:
    """The same rows [batch, heads, length, dim] as integers, with numbers side by side.

    So one compiled kernel does for dtypes of a size, and there is none that Triton does not know.
    """
    rows = column.unsqueeze(-1) if column.ndim == 3 else column
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows.view(BITS[min(8, rows.element_size())])


def block_rows(rows: Tensor) -> int:
    """Rows of a program: a power of two, fewer the wider the rows are, so that a narrow column takes few programs."""
    row_bytes = triton.next_power_of_2(rows.shape[-1]) * rows.element_size()
    return max(1, min(_MOST_ROWS, _BLOCK_BYTES // row_bytes))


@triton.jit
def _move_kernel(
    destinations_ptr,
    num_heads,
    length,
    n_blocks,
    x0_ptr,
    out0_ptr,
    stride_b0,
    stride_h0,
    stride_n0,
    x1_ptr,
    out1_ptr,
    stride_b1,
    stride_h1,
    stride_n1,
    x2_ptr,
    out2_ptr,
    stride_b2,
    stride_h2,
    stride_n2,
    x3_ptr,
    out3_ptr,
    stride_b3,
    stride_h3,
    stride_n3,
    DIM_0: tl.constexpr,
    BLOCK_0: tl.constexpr,
    DIM_1: tl.constexpr,
    BLOCK_1: tl.constexpr,
    DIM_2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    DIM_3: tl.constexpr,
    BLOCK_3: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    segment = (tl.program_id(0) // n_blocks).to(tl.int64)
    row, head = segment // num_heads, segment % num_heads
    offs_n = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    destination = tl.load(destinations_ptr + segment * length + offs_n, mask=offs_n < length, other=-1).to(tl.int64)
    if DIM_0 > 0:
        from_ptr = x0_ptr + row * stride_b0 + head * stride_h0
        _move_rows(from_ptr, stride_n0, offs_n, out0_ptr, destination, DIM_0, BLOCK_0)
    if DIM_1 > 0:
        from_ptr = x1_ptr + row * stride_b1 + head * stride_h1
        _move_rows(from_ptr, stride_n1, offs_n, out1_ptr, destination, DIM_1, BLOCK_1)
    if DIM_2 > 0:
        from_ptr = x2_ptr + row * stride_b2 + head * stride_h2
        _move_rows(from_ptr, stride_n2, offs_n, out2_ptr, destination, DIM_2, BLOCK_2)
    if DIM_3 > 0:
        from_ptr = x3_ptr + row * stride_b3 + head * stride_h3
        _move_rows(from_ptr, stride_n3, offs_n, out3_ptr, destination, DIM_3, BLOCK_3)


@triton.jit
def _move_rows(x_ptr, stride_x, offs_n, out_ptr, destination, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``offs_n`` of x to the rows ``destination`` of a contiguous output; those below 0 stay behind."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (destination >= 0)[:, None] & (offs_d[None, :] < DIM)
    rows = tl.load(x_ptr + offs_n[:, None] * stride_x + offs_d[None, :], mask=mask)
    tl.store(out_ptr + destination[:, None] * DIM + offs_d[None, :], rows, mask=mask)
