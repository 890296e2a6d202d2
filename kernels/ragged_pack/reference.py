"""Packing in plain PyTorch: int64 row numbers are computed once, then every column is moved by one gather."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvzip_press.kernels.ragged_pack.arguments import check_total
from kvzip_press.kernels.ragged_pack.bits import as_bits
from kvzip_press.kernels.ragged_pack.indices import cumulated, spread
from kvzip_press.kernels.ragged_pack.packed import Packed


def pack(columns: Sequence[Tensor], keep: Tensor) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.pack`."""
    kept = keep.nonzero(as_tuple=True)
    packed = tuple(_gather(column, *kept) for column in columns)
    return Packed(packed, cumulated(keep.sum(-1).flatten()).to(torch.int32))


def merge(
    context: Packed,
    tail: Sequence[Tensor],
    keep_tail: Tensor,
    keep_context: Tensor | None,
    total_kept: int | None = None,  # noqa: ARG001  # found by the way
) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.merge`."""
    total = context.columns[0].shape[0]
    old = context.cu_seqlens.long()
    if keep_context is None:
        source, kept_before = torch.arange(total, device=old.device), torch.arange(total + 1, device=old.device)
    else:
        source, kept_before = keep_context.nonzero().squeeze(-1), cumulated(keep_context)
    kept = kept_before[old]
    row, head, index = keep_tail.nonzero(as_tuple=True)
    new = cumulated(keep_tail.sum(-1).flatten())
    # Before a segment's context lie the tails of earlier segments too, before its tail the contexts up to its own.
    from_context = torch.arange(source.numel(), device=old.device) + spread(new[:-1], kept.diff(), source.numel())
    from_tail = torch.arange(row.numel(), device=old.device) + spread(kept[1:], new.diff(), row.numel())
    sources = old.new_zeros(source.numel() + row.numel()).index_copy_(0, from_context, source)

    def joined(packed: Tensor, tail_rows: Tensor) -> Tensor:
        bits = as_bits(packed)
        fresh = bits.index_select(0, sources) if total else bits.new_empty(sources.numel(), *bits.shape[1:])
        return fresh.index_copy_(0, from_tail, as_bits(tail_rows)).view(packed.dtype)

    both = zip(context.columns, tail, strict=True)
    columns = tuple(joined(packed, _gather(column, row, head, index)) for packed, column in both)
    return Packed(columns, (kept + new).to(torch.int32))


def select_rows(context: Packed, rows: Tensor, num_heads: int) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.select_rows`."""
    segments = (rows.unsqueeze(-1) * num_heads + torch.arange(num_heads, device=rows.device)).flatten()
    old = context.cu_seqlens.long()
    lengths = old.diff()[segments]
    new = cumulated(lengths)
    total = int(new[-1])
    check_total(total)
    sources = torch.arange(total, device=rows.device) + spread(old[segments] - new[:-1], lengths, total)
    columns = tuple(as_bits(column).index_select(0, sources).view(column.dtype) for column in context.columns)
    return Packed(columns, new.to(torch.int32))


def _gather(column: Tensor, row: Tensor, head: Tensor, index: Tensor) -> Tensor:
    """``column[row, head, index]`` [n(, dim)] of a [batch, heads, length(, dim)] view with any strides.

    A gather of whole rows is many times faster by one index than by three, so the view is seen as a table of rows that
    begin wherever a multiple of all its strides does; the table covers no address that the view does not reach.
    """
    if column.ndim == 4 and column.stride(-1) != 1:
        column = column.contiguous()
    width = column.shape[3:]
    if row.numel() == 0:
        return column.new_empty(0, *width)
    sizes, strides = column.shape[:3], column.stride()[:3]
    step = math.gcd(*(stride for size, stride in zip(sizes, strides, strict=True) if size > 1)) or 1
    steps = [stride // step for stride in strides]
    n_table = 1 + sum((size - 1) * stride for size, stride in zip(sizes, steps, strict=True))
    table = as_bits(column).as_strided((n_table, *width), (step, *column.stride()[3:]))
    return table.index_select(0, row * steps[0] + head * steps[1] + index * steps[2]).view(column.dtype)
