"""Checks of the arguments of the packing ops."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_cu_seqlens, check_device, check_dtype, check_like, check_shape
from kvzip_press.kernels.ragged_pack.packed import Packed

_TAIL = "batch, num_key_value_heads, t"


def check_packed(context: object) -> None:
    """Raises unless ``context`` is a Packed whose tensors go with each other."""
    if not isinstance(context, Packed):
        raise TypeError(f"context: expected a Packed, got {type(context).__name__}")
    (total,) = _check_columns("columns", context.columns, "total")
    check_cu_seqlens(context.cu_seqlens, total, context.columns[0].device)


def check_dense(name: str, columns: Sequence[Tensor], keep_name: str, keep: Tensor, dims: str) -> None:
    """Raises unless ``columns`` and the bool mask ``keep`` [dims] go with each other."""
    sizes = _check_columns(name, columns, dims)
    check_shape(keep_name, keep, sizes, dims)
    check_dtype(keep_name, keep, torch.bool)
    check_device(keep_name, keep, columns[0].device)


def check_tail(context: Packed, tail: Sequence[Tensor], keep_tail: Tensor) -> None:
    """Raises unless ``tail`` has the columns of ``context``, for as many segments."""
    check_dense("tail", tail, "keep_tail", keep_tail, _TAIL)
    if len(tail) != len(context.columns):
        raise ValueError(f"tail: expected as many columns as the context has, {len(context.columns)}, got {len(tail)}")
    for number, (column, packed) in enumerate(zip(tail, context.columns, strict=True)):
        check_like(f"tail[{number}]", column, f"columns[{number}]", packed)
        dims = _TAIL if packed.ndim == 1 else f"{_TAIL}, dim"
        check_shape(f"tail[{number}]", column, (*keep_tail.shape, *packed.shape[1:]), dims)
    n_segments = keep_tail.shape[0] * keep_tail.shape[1]
    check_shape("cu_seqlens", context.cu_seqlens, (n_segments + 1,), "batch * num_key_value_heads + 1")


def check_total(n_pairs: int) -> None:
    """Raises ValueError for more pairs than int32 ``cu_seqlens`` can count."""
    if n_pairs > torch.iinfo(torch.int32).max:
        raise ValueError(f"pairs: expected at most 2**31 - 1, which int32 cu_seqlens can count, got {n_pairs}")


def _check_columns(name: str, columns: object, dims: str) -> tuple[int, ...]:
    """Checks columns, each [dims] or [dims, dim], against the first one; returns the sizes of ``dims``."""
    if not isinstance(columns, Sequence):  # a tensor is none, though it could pass for the sequence of its rows
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(columns).__name__}")
    if not columns:
        raise ValueError(f"{name}: expected one column or more, got none")
    n_dims = dims.count(",") + 1
    for number, column in enumerate(columns):
        one = f"{name}[{number}]"
        if not isinstance(column, Tensor):
            raise TypeError(f"{one}: expected a tensor [{dims}(, dim)], got {type(column).__name__}")
        if column.ndim not in {n_dims, n_dims + 1}:
            raise ValueError(f"{one}: expected [{dims}(, dim)], got shape {tuple(column.shape)}")
        expected = (*columns[0].shape[:n_dims], *column.shape[n_dims:])
        check_shape(one, column, expected, dims if column.ndim == n_dims else f"{dims}, dim")
        check_device(one, column, columns[0].device)
    return tuple(columns[0].shape[:n_dims])
