"""Checks of the arguments of the packing ops."""

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_cu_seqlens, check_device, check_dtype, check_rank, check_shape
from kvzip_press.kernels.ragged_pack.packed import Packed


def check_packed(keys: Tensor, values: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Packed:
    """Checks the four tensors of a packed context against each other; returns them as one."""
    check_rank("keys", keys, "total, head_dim")
    check_rank("values", values, "total, value_head_dim")
    check_shape("values", values, (keys.shape[0], values.shape[1]), "total, value_head_dim")
    check_device("values", values, keys.device)
    check_positions("positions", positions, (keys.shape[0],), "total", keys)
    check_cu_seqlens(cu_seqlens, keys.shape[0], keys.device)
    return Packed(keys, values, positions, cu_seqlens)


def check_dense(keys: tuple[str, Tensor], values: tuple[str, Tensor], keep: tuple[str, Tensor]) -> tuple[int, int, int]:
    """Checks named dense keys, values and keep mask against each other; returns (batch, heads, length)."""
    check_rank(*keys, "batch, num_key_value_heads, n, head_dim")
    batch_size, num_heads, length, _ = keys[1].shape
    check_rank(*values, "batch, num_key_value_heads, n, value_head_dim")
    expected = (batch_size, num_heads, length, values[1].shape[3])
    check_shape(*values, expected, "batch, num_key_value_heads, n, value_head_dim")
    check_shape(*keep, expected[:3], "batch, num_key_value_heads, n")
    check_dtype(*keep, torch.bool)
    check_device(*values, keys[1].device)
    check_device(*keep, keys[1].device)
    return batch_size, num_heads, length


def check_positions(name: str, positions: Tensor, shape: tuple[int, ...], dims: str, keys: Tensor) -> None:
    """Raises unless ``positions`` is int32 of ``shape`` on the device of ``keys``."""
    check_shape(name, positions, shape, dims)
    check_dtype(name, positions, torch.int32)
    check_device(name, positions, keys.device)


def check_total(n_pairs: int) -> None:
    """Raises ValueError for more pairs than int32 ``cu_seqlens`` can count."""
    if n_pairs > torch.iinfo(torch.int32).max:
        raise ValueError(f"pairs: expected at most 2**31 - 1, which int32 cu_seqlens can count, got {n_pairs}")
