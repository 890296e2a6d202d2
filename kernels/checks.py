"""Argument checks that all ops share: cheap, and without reading data from a device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rank(name: str, tensor: object, dims: str) -> None:
    """Raises unless ``tensor`` is a tensor with one dimension for each word of ``dims``.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has a different number of dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [{dims}], got {type(tensor).__name__}")
    if tensor.ndim != dims.count(",") + 1:
        raise ValueError(f"{name}: expected [{dims}], got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: object, expected: Sequence[int], dims: str) -> None:
    """Raises unless ``tensor`` has exactly the shape ``expected``; ``dims`` names the dimensions."""
    check_rank(name, tensor, dims)
    assert isinstance(tensor, Tensor)
    if tensor.shape != torch.Size(expected):
        raise ValueError(f"{name}: expected [{dims}] = {tuple(expected)}, got shape {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless ``tensor`` has ``dtype``."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless ``tensor`` is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless ``tensor`` has the dtype (TypeError) and the device (ValueError) of ``other``."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    check_device(name, tensor, other.device)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is floating point."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


def check_groups(num_attention_heads: int, num_key_value_heads: int) -> None:
    """Raises ValueError unless the query heads divide evenly among the key-value heads."""
    if num_key_value_heads < 1 or num_attention_heads < 1 or num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"query heads: expected a multiple of the {num_key_value_heads} key-value heads, got {num_attention_heads}"
        )


def check_mask(name: str, mask: object, batch_size: int, num_heads: int, rows: int, columns: int) -> None:
    """Raises unless ``mask`` is bool [batch or 1, query heads or 1, rows, columns]."""
    check_rank(name, mask, "batch|1, num_attention_heads|1, query_length, key_length")
    assert isinstance(mask, Tensor)
    check_dtype(name, mask, torch.bool)
    fits = mask.shape[0] in (1, batch_size) and mask.shape[1] in (1, num_heads)
    if not fits or mask.shape[2:] != (rows, columns):
        expected = f"[{batch_size}|1, {num_heads}|1, {rows}, {columns}]"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(mask.shape)}")


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError unless ``softcap`` is None or positive."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected None or a number above 0, got {softcap}")


def check_cu_seqlens(cu_seqlens: object, total: int, device: torch.device, *, within: bool = False) -> None:
    """Raises unless ``cu_seqlens`` is int32 [segments + 1] on ``device`` and, on a CPU, rises from 0 to ``total``.

    With ``within`` it may begin above 0 and end below ``total``: a slice of the segments that are stored together.
    On other devices the content is not checked, because reading it would wait for the device.
    """
    check_rank("cu_seqlens", cu_seqlens, "segments + 1")
    assert isinstance(cu_seqlens, Tensor)
    check_dtype("cu_seqlens", cu_seqlens, torch.int32)
    check_device("cu_seqlens", cu_seqlens, device)
    if cu_seqlens.numel() < 1:
        raise ValueError("cu_seqlens: expected at least the leading 0, got no element")
    if device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if within and (bounds[0] < 0 or bounds[-1] > total):
        raise ValueError(f"cu_seqlens: expected to run within 0 .. {total}, got {bounds[0]} to {bounds[-1]}")
    if not within and (bounds[0] != 0 or bounds[-1] != total):
        raise ValueError(f"cu_seqlens: expected to run from 0 to {total}, got {bounds[0]} to {bounds[-1]}")
    if sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens: expected values that never fall, got {bounds}")
