"""Checks and dispatch of :func:`pack`, :func:`unpack`, :func:`merge` and :func:`select_rows`."""

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_cu_seqlens, check_device, check_dtype, check_like, check_rank, check_shape
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.ragged_pack import reference
from kvzip_press.kernels.ragged_pack.arguments import check_dense, check_packed, check_positions, check_total
from kvzip_press.kernels.ragged_pack.packed import Packed
from kvzip_press.kernels.triton_support import reason_against_triton

_TRITON = "kvzip_press.kernels.ragged_pack.triton"
_PACK = {"triton": Impl(deferred(_TRITON, "pack"), reason_against_triton), "reference": Impl(reference.pack)}
_UNPACK = {"reference": Impl(reference.unpack)}
_MERGE = {"triton": Impl(deferred(_TRITON, "merge"), reason_against_triton), "reference": Impl(reference.merge)}
_SELECT_ROWS = {"reference": Impl(reference.select_rows)}


def pack(
    keys: Tensor, values: Tensor, keep: Tensor, positions: Tensor | None = None, *, impl: str | None = None
) -> Packed:
    """Moves the pairs that a mask keeps into storage of exactly their size (KVzip, arXiv 2505.23416).

    Args:
        keys: [batch, num_key_value_heads, n, head_dim], any dtype, a view with any strides.
        values: [batch, num_key_value_heads, n, value_head_dim], likewise.
        keep: bool [batch, num_key_value_heads, n], True for a pair to keep; a head may keep none.
        positions: int32 [batch, n], the position of each token; None: 0 .. n - 1.
        impl: "triton" (one pass over the rows, on a CUDA device), "reference" (plain PyTorch, any device) or None:
            "triton" where it can, else "reference". The result is the same, bit for bit.

    Returns:
        Keys, values and positions of the kept pairs, and int32 cu_seqlens [batch * num_key_value_heads + 1]. All are
        copies, bit for bit, also when everything is kept: the caller may free the dense cache.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, "triton" cannot run there, or more than 2**31 - 1
            pairs are given.
        TypeError: a dtype is not as above.
    """
    batch_size, _, length = check_dense(("keys", keys), ("values", values), ("keep", keep))
    if positions is not None:
        check_positions("positions", positions, (batch_size, length), "batch, n", keys)
    check_total(keep.numel())
    return select("pack", _PACK, impl, keys.device)(keys, values, keep, positions)


def unpack(
    packed: Tensor, cu_seqlens: Tensor, max_len: int | None = None, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Spreads packed rows over a dense, padded tensor, a segment a row.

    Args:
        packed: [total, ...], any dtype: packed keys, values or positions.
        cu_seqlens: int32 [segments + 1], from 0 to total.
        max_len: length of the result; None: that of the longest segment.
        impl: "reference" or None.

    Returns:
        dense [segments, max_len, ...], 0 where there is no row, and mask, bool [segments, max_len], True where one is.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, or a segment is longer than ``max_len``.
        TypeError: a dtype is not as above.
    """
    if not isinstance(packed, Tensor):
        raise TypeError(f"packed: expected a tensor [total, ...], got {type(packed).__name__}")
    if packed.ndim < 1:
        raise ValueError(f"packed: expected [total, ...], got shape {tuple(packed.shape)}")
    check_cu_seqlens(cu_seqlens, packed.shape[0], packed.device)
    return select("unpack", _UNPACK, impl)(packed, cu_seqlens, max_len)


def merge(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_positions: Tensor,
    keep_tail: Tensor,
    *,
    keep_context: Tensor | None = None,
    impl: str | None = None,
) -> Packed:
    """Packs the survivors of a packed context and of the dense tail behind it into new storage, segment by segment.

    Args:
        keys: packed context [total, head_dim], any dtype.
        values: packed context [total, value_head_dim].
        positions: int32 [total].
        cu_seqlens: int32 [batch * num_key_value_heads + 1], from 0 to total.
        tail_keys: [batch, num_key_value_heads, t, head_dim], a view with any strides; t may be 0.
        tail_values: [batch, num_key_value_heads, t, value_head_dim], likewise.
        tail_positions: int32 [batch, t].
        keep_tail: bool [batch, num_key_value_heads, t], True for a pair to keep.
        keep_context: bool [total], True for a pair to keep; None keeps all.
        impl: "triton" (one pass over the rows, on a CUDA device), "reference" (plain PyTorch, any device) or None:
            "triton" where it can, else "reference". The result is the same, bit for bit.

    Returns:
        As :func:`pack`: in each segment the surviving context, then the surviving tail.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, "triton" cannot run there, or more than 2**31 - 1
            pairs are given.
        TypeError: a dtype is not as above.
    """
    context = check_packed(keys, values, positions, cu_seqlens)
    shape = check_dense(("tail_keys", tail_keys), ("tail_values", tail_values), ("keep_tail", keep_tail))
    check_like("tail_keys", tail_keys, "keys", keys)
    check_like("tail_values", tail_values, "values", values)
    for name, tail, packed in (("tail_keys", tail_keys, keys), ("tail_values", tail_values, values)):
        check_shape(name, tail, (*shape, packed.shape[1]), "batch, num_key_value_heads, t, head_dim")
    check_shape("cu_seqlens", cu_seqlens, (shape[0] * shape[1] + 1,), "batch * num_key_value_heads + 1")
    check_positions("tail_positions", tail_positions, (shape[0], shape[2]), "batch, t", keys)
    if keep_context is not None:
        check_shape("keep_context", keep_context, (keys.shape[0],), "total")
        check_dtype("keep_context", keep_context, torch.bool)
        check_device("keep_context", keep_context, keys.device)
    check_total(keys.shape[0] + keep_tail.numel())
    run = select("merge", _MERGE, impl, keys.device)
    return run(context, tail_keys, tail_values, tail_positions, keep_tail, keep_context)


def select_rows(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor,
    num_heads: int,
    *,
    impl: str | None = None,
) -> Packed:
    """Packs whole batch rows of a packed context anew, in any order and any number of times.

    Args:
        keys: packed context [total, head_dim], any dtype.
        values: packed context [total, value_head_dim].
        positions: int32 [total].
        cu_seqlens: int32 [n_rows * num_heads + 1], from 0 to total.
        rows: int64 [new_rows], the packed row that each new row copies.
        num_heads: key-value heads of a row.
        impl: "reference" or None.

    Returns:
        As :func:`pack`, with new_rows * num_heads segments.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, the result would exceed 2**31 - 1 pairs or, on a CPU,
            ``rows`` names no packed row.
        TypeError: a dtype is not as above.
    """
    context = check_packed(keys, values, positions, cu_seqlens)
    n_segments = cu_seqlens.shape[0] - 1
    if num_heads < 1 or n_segments % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {n_segments} segments, got {num_heads}")
    check_rank("rows", rows, "new_rows")
    check_dtype("rows", rows, torch.int64)
    check_device("rows", rows, keys.device)
    n_rows = n_segments // num_heads
    if rows.device.type == "cpu" and not all(0 <= row < n_rows for row in rows.tolist()):
        raise ValueError(f"rows: expected packed rows 0 .. {n_rows - 1}, got {rows.tolist()}")
    return select("select_rows", _SELECT_ROWS, impl)(context, rows, num_heads)
