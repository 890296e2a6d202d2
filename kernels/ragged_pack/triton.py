"""Packing by one kernel that moves the rows of a column: each pair knows where it goes, and only kept ones are read.

The destinations are one int32 a source pair, -1 for a pair to drop, made once by a cumulative sum; then each column is
moved by a launch of its own. Nothing of the size of a wide column is allocated but the result.
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
_MOST_ROWS = 1024  # of a narrow column, 8 for a thread: more would leave too few programs for a short cache


def pack(columns: Sequence[Tensor], keep: Tensor) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.pack`."""
    packed = _fresh(columns, cumulated(keep.sum(-1).flatten()))
    _scatter(columns, _destinations(keep, 0), packed)
    return packed


def merge(context: Packed, tail: Sequence[Tensor], keep_tail: Tensor, keep_context: Tensor | None) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.merge`."""
    columns = [column[None, None] for column in context.columns]  # one segment of a dense cache
    total = columns[0].shape[2]
    keep = keep_tail.new_ones(total) if keep_context is None else keep_context
    old, new = context.cu_seqlens.long(), cumulated(keep_tail.sum(-1).flatten())
    kept = cumulated(keep)[old]
    packed = _fresh(tail, kept + new)
    # Before a segment's context lie the tails of earlier segments too, before its tail the contexts up to its own.
    _scatter(columns, _destinations(keep, spread(new[:-1], old.diff(), total)), packed)
    _scatter(tail, _destinations(keep_tail, kept[1:].view(*keep_tail.shape[:2], 1)), packed)
    return packed


def _fresh(columns: Sequence[Tensor], bounds: Tensor) -> Packed:
    """Storage for as many pairs as ``bounds`` end with; reading that number is the one wait for the device."""
    total = int(bounds[-1])
    return Packed(tuple(column.new_empty(total, *column.shape[3:]) for column in columns), bounds.to(torch.int32))


def _destinations(keep: Tensor, shift: Tensor | int) -> Tensor:
    """Int32 in the shape of ``keep``: how many kept pairs come before each kept one, plus ``shift``; -1 if dropped."""
    numbers = keep.flatten().to(torch.int32).cumsum_(0).sub_(1).view(keep.shape)
    return numbers.add_(shift).masked_fill_(~keep, -1)


def _scatter(columns: Sequence[Tensor], destinations: Tensor, packed: Packed) -> None:
    """Moves the pairs of [batch, heads, length(, dim)] views whose destination is not negative to that row."""
    with torch.cuda.device_of(destinations):  # Triton launches on the current device
        for column, out in zip(columns, packed.columns, strict=True):
            if column.numel() and out.numel():
                _move(column, destinations, out)


def _move(column: Tensor, destinations: Tensor, out: Tensor) -> None:
    """Moves the rows of one column; ``out`` [total(, dim)] is contiguous."""
    rows = rows_as_bits(column)
    batch_size, num_heads, length, dim = rows.shape
    block_n = block_rows(rows)
    n_blocks = triton.cdiv(length, block_n)
    _move_kernel[(batch_size * num_heads * n_blocks,)](
        rows,
        destinations,
        out.view(rows.dtype),
        num_heads,
        length,
        n_blocks,
        *rows.stride()[:3],
        DIM=dim,
        BLOCK_N=block_n,
        BLOCK_D=triton.next_power_of_2(dim),
    )


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
    x_ptr,
    destinations_ptr,
    out_ptr,
    num_heads,
    length,
    n_blocks,
    stride_xb,
    stride_xh,
    stride_xn,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    destination = tl.load(destinations_ptr + segment * length + offs_n, mask=offs_n < length, other=-1).to(tl.int64)
    mask = (destination >= 0)[:, None] & (offs_d[None, :] < DIM)
    from_ptr = x_ptr + segment // num_heads * stride_xb + segment % num_heads * stride_xh
    rows = tl.load(from_ptr + offs_n[:, None] * stride_xn + offs_d[None, :], mask=mask)
    tl.store(out_ptr + destination[:, None] * DIM + offs_d[None, :], rows, mask=mask)
