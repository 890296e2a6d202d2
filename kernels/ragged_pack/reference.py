"""Packing in plain PyTorch: int64 row numbers are computed once, then every tensor is moved by one gather."""

import math

import torch
from torch import Tensor

from kvzip_press.kernels.ragged_pack.indices import cumulated, spread
from kvzip_press.kernels.ragged_pack.packed import Packed


def pack(keys: Tensor, values: Tensor, keep: Tensor, positions: Tensor | None) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.pack`."""
    row, head, column = keep.nonzero(as_tuple=True)
    kept_positions = column.to(torch.int32) if positions is None else positions[row, column]
    lengths = keep.sum(-1).flatten()
    return Packed(
        _gather(keys, row, head, column),
        _gather(values, row, head, column),
        kept_positions,
        cumulated(lengths).to(torch.int32),
    )


def unpack(packed: Tensor, cu_seqlens: Tensor, max_len: int | None) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_pack.unpack`."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if max_len is not None and max_len < longest:
        raise ValueError(f"max_len: expected at least the longest segment, {longest}, got {max_len}")
    width = longest if max_len is None else max_len
    mask = torch.arange(width, device=packed.device) < lengths.unsqueeze(-1)
    dense = packed.new_zeros(*mask.shape, *packed.shape[1:])
    dense[mask] = packed
    return dense, mask


def merge(
    context: Packed,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_positions: Tensor,
    keep_tail: Tensor,
    keep_context: Tensor | None,
) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.merge`."""
    total = context.keys.shape[0]
    old = context.cu_seqlens.long()
    if keep_context is None:
        source, kept_before = torch.arange(total, device=old.device), torch.arange(total + 1, device=old.device)
    else:
        source, kept_before = keep_context.nonzero().squeeze(-1), cumulated(keep_context)
    kept = kept_before[old]
    row, head, column = keep_tail.nonzero(as_tuple=True)
    tail = cumulated(keep_tail.sum(-1).flatten())
    # Before a segment's context lie the tails of earlier segments too, before its tail the contexts up to its own.
    from_context = torch.arange(source.numel(), device=old.device) + spread(tail[:-1], kept.diff(), source.numel())
    from_tail = torch.arange(row.numel(), device=old.device) + spread(kept[1:], tail.diff(), row.numel())
    index = old.new_zeros(source.numel() + row.numel()).index_copy_(0, from_context, source)

    def joined(packed: Tensor, tail_rows: Tensor) -> Tensor:
        fresh = packed.index_select(0, index) if total else packed.new_empty(index.numel(), *packed.shape[1:])
        return fresh.index_copy_(0, from_tail, tail_rows)

    return Packed(
        joined(context.keys, _gather(tail_keys, row, head, column)),
        joined(context.values, _gather(tail_values, row, head, column)),
        joined(context.positions, tail_positions[row, column]),
        (kept + tail).to(torch.int32),
    )


def select_rows(context: Packed, rows: Tensor, num_heads: int) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.select_rows`."""
    segments = (rows.unsqueeze(-1) * num_heads + torch.arange(num_heads, device=rows.device)).flatten()
    old = context.cu_seqlens.long()
    lengths = old.diff()[segments]
    new = cumulated(lengths)
    total = int(new[-1])
    index = torch.arange(total, device=rows.device) + spread(old[segments] - new[:-1], lengths, total)
    keys, values, positions = (tensor.index_select(0, index) for tensor in context[:3])
    return Packed(keys, values, positions, new.to(torch.int32))


def _gather(tensor: Tensor, row: Tensor, head: Tensor, column: Tensor) -> Tensor:
    """``tensor[row, head, column]`` [n, head_dim] of a [batch, heads, length, head_dim] view with any strides.

    A gather of whole rows is many times faster by one index than by three, so the view is seen as a table of rows that
    begin wherever a multiple of all its strides does; the table covers no address that the view does not reach.
    """
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if row.numel() == 0:
        return tensor.new_empty(0, tensor.shape[-1])
    sizes, strides = tensor.shape[:3], tensor.stride()[:3]
    step = math.gcd(*(stride for size, stride in zip(sizes, strides, strict=True) if size > 1)) or 1
    steps = [stride // step for stride in strides]
    n_table = 1 + sum((size - 1) * stride for size, stride in zip(sizes, steps, strict=True))
    table = tensor.as_strided((n_table, tensor.shape[-1]), (step, 1))
    return table.index_select(0, row * steps[0] + head * steps[1] + column * steps[2])
