"""The rows of a pool, keys or values: in the model's dtype, or as codes of 8 bits with a scale each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvzip_press.errors import InvalidArgumentError, did_you_mean
from kvzip_press.kernels.row_codec import Codes

ArenaRows = torch.Tensor | Codes  # [pairs, head_dim]
STORAGES = ("model", "int8")
_SCALE_BYTES = 2


def check_pool_storage(storage: str) -> None:
    """Raises InvalidArgumentError unless pools can hold pairs in a storage."""
    if storage not in STORAGES:
        raise InvalidArgumentError(
            f"expected a pool's storage out of {', '.join(STORAGES)}, got {storage!r:.80}"
            f"{did_you_mean(storage, STORAGES) if isinstance(storage, str) else ''}: the attention over a pool reads "
            "codes of 8 bits, and no others, as they lie; contexts in other storages are decoded into a pool of the "
            "model's dtype"
        )


def row_bytes(head_dim: int, dtype: torch.dtype, storage: str) -> int:
    """Returns the bytes of a key or of a value."""
    return head_dim * dtype.itemsize if storage == "model" else head_dim + _SCALE_BYTES


def empty_rows(n: int, head_dim: int, dtype: torch.dtype, storage: str, device: torch.device | str) -> ArenaRows:
    """Returns memory for ``n`` keys or values."""
    if storage == "model":
        return torch.empty(n, head_dim, dtype=dtype, device=device)
    codes = torch.empty(n, head_dim, dtype=torch.int8, device=device)
    return Codes(codes, torch.empty(n, dtype=torch.bfloat16, device=device), "int8")


def write_rows(arena: ArenaRows, begin: int, rows: ArenaRows) -> None:
    """Copies rows into an arena, from ``begin`` on."""
    place = slice(begin, begin + rows.shape[0])
    if isinstance(arena, Codes) and isinstance(rows, Codes):
        arena.codes[place].copy_(rows.codes)
        arena.scales[place].copy_(rows.scales)
    else:
        assert isinstance(arena, torch.Tensor) and isinstance(rows, torch.Tensor), "a pool checks what it is given"
        arena[place].copy_(rows)


def joined_rows(parts: Sequence[ArenaRows]) -> ArenaRows:
    """Returns rows one after another, all of one storage."""
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    codes = [part for part in parts if isinstance(part, Codes)]
    if not codes:
        return torch.cat(tensors)
    return Codes(torch.cat([one.codes for one in codes]), torch.cat([one.scales for one in codes]), "int8")


def rows_to(rows: ArenaRows, device: torch.device) -> ArenaRows:
    """Returns rows on a device."""
    return (
        Codes(rows.codes.to(device), rows.scales.to(device), rows.codec) if isinstance(rows, Codes) else rows.to(device)
    )


def kind_of(rows: ArenaRows) -> torch.dtype | str:
    """Returns what tells rows apart that cannot lie in one arena: a dtype, or a codec."""
    return rows.codec if isinstance(rows, Codes) else rows.dtype
