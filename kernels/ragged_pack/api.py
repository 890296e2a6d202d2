"""Checks and dispatch of :func:`pack`, :func:`merge` and :func:`select_rows`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_device, check_dtype, check_rank, check_shape
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.ragged_pack import reference
from kvzip_press.kernels.ragged_pack.arguments import check_dense, check_packed, check_tail, check_total
from kvzip_press.kernels.ragged_pack.packed import Packed
from kvzip_press.kernels.triton_support import reason_against_triton

_TRITON = "kvzip_press.kernels.ragged_pack.triton"
_PACK = {"triton": Impl(deferred(_TRITON, "pack"), reason_against_triton), "reference": Impl(reference.pack)}
_MERGE = {"triton": Impl(deferred(_TRITON, "merge"), reason_against_triton), "reference": Impl(reference.merge)}
_SELECT_ROWS = {"reference": Impl(reference.select_rows)}


def pack(columns: Sequence[Tensor], keep: Tensor, *, impl: str | None = None) -> Packed:
    """Moves the pairs that a mask keeps into storage of exactly their size (KVzip, arXiv 2505.23416).

    Args:
        columns: what a pair has, one or more tensors [batch, num_key_value_heads, n] or
            [batch, num_key_value_heads, n, dim], each of any dtype and width, views with any strides (0 too: what all
            heads share is handed in expanded).
        keep: bool [batch, num_key_value_heads, n], True for a pair to keep; a head may keep none.
        impl: "triton" (a pass over the rows of each column, on a CUDA device), "reference" (plain PyTorch, any device)
            or None: "triton" where it can, else "reference". The result is the same, bit for bit.

    Returns:
        The columns of the kept pairs, and int32 cu_seqlens [batch * num_key_value_heads + 1]. All are copies, bit for
        bit, also when everything is kept: the caller may free the dense cache.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, there is no column, "triton" cannot run there, or more
            than 2**31 - 1 pairs are given.
        TypeError: a dtype is not as above, or ``columns`` is no sequence of tensors.
    """
    check_dense("columns", columns, "keep", keep, "batch, num_key_value_heads, n")
    check_total(keep.numel())
    return select("pack", _PACK, impl, keep.device)(columns, keep)


def merge(
    context: Packed,
    tail: Sequence[Tensor],
    keep_tail: Tensor,
    *,
    keep_context: Tensor | None = None,
    total: int | None = None,
    impl: str | None = None,
) -> Packed:
    """Packs the survivors of a packed context and of the dense tail behind it into new storage, segment by segment.

    Args:
        context: columns [total] or [total, dim], any dtypes, and int32 cu_seqlens [batch * num_key_value_heads + 1],
            from 0 to total.
        tail: as many columns as the context has, of the same dtypes and widths,
            [batch, num_key_value_heads, t] or [batch, num_key_value_heads, t, dim], views with any strides; t may be 0.
        keep_tail: bool [batch, num_key_value_heads, t], True for a pair to keep.
        keep_context: bool [total], True for a pair to keep; None keeps all.
        total: how many pairs that are, if the caller knows; otherwise "triton" waits for the device to say it.
        impl: "triton" (a pass over the rows of each column, on a CUDA device), "reference" (plain PyTorch, any device)
            or None: "triton" where it can, else "reference". The result is the same, bit for bit.

    Returns:
        As :func:`pack`: in each segment the surviving context, then the surviving tail.

    Raises:
        ValueError: a shape, device, number of columns or ``impl`` is not as above, "triton" cannot run there, or more
            than 2**31 - 1 pairs are given.
        TypeError: a dtype is not as above, ``context`` is no Packed, or ``tail`` no sequence of tensors.
    """
    check_packed(context)
    check_tail(context, tail, keep_tail)
    n_context = context.columns[0].shape[0]
    if keep_context is not None:
        check_shape("keep_context", keep_context, (n_context,), "total")
        check_dtype("keep_context", keep_context, torch.bool)
        check_device("keep_context", keep_context, keep_tail.device)
    check_total(n_context + keep_tail.numel())
    return select("merge", _MERGE, impl, keep_tail.device)(context, tail, keep_tail, keep_context, total)


def select_rows(context: Packed, rows: Tensor, num_heads: int, *, impl: str | None = None) -> Packed:
    """Packs whole batch rows of a packed context anew, in any order and any number of times.

    Args:
        context: columns [total] or [total, dim], any dtypes, and int32 cu_seqlens [n_rows * num_heads + 1], from 0 to
            total.
        rows: int64 [new_rows], the packed row that each new row copies.
        num_heads: key-value heads of a row.
        impl: "reference" or None.

    Returns:
        As :func:`pack`, with new_rows * num_heads segments.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, the result would exceed 2**31 - 1 pairs or, on a CPU,
            ``rows`` names no packed row.
        TypeError: a dtype is not as above, or ``context`` is no Packed.
    """
    check_packed(context)
    n_segments = context.cu_seqlens.shape[0] - 1
    if num_heads < 1 or n_segments % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {n_segments} segments, got {num_heads}")
    check_rank("rows", rows, "new_rows")
    check_dtype("rows", rows, torch.int64)
    check_device("rows", rows, context.cu_seqlens.device)
    n_rows = n_segments // num_heads
    if rows.device.type == "cpu" and not all(0 <= row < n_rows for row in rows.tolist()):
        raise ValueError(f"rows: expected packed rows 0 .. {n_rows - 1}, got {rows.tolist()}")
    return select("select_rows", _SELECT_ROWS, impl)(context, rows, num_heads)
