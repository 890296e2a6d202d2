"""Files of shares for heads: JSON of ours, and LU-KV's curves (``.npy``). Reading either runs no code."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import replacing
from kvzip_press.untrusted import parse_json, read_bytes

FORMAT = "kvzip_press_head_shares"
_MAX_BYTES = 64 * 2**20
_NPY = b"\x93NUMPY"


def read_shares(path: Path) -> torch.Tensor:
    """Returns the shares in a file: ``[layers, heads]``, or a curve ``[99, layers, heads]``, float64.

    Raises:
        InvalidArgumentError: The file does not exist, or holds something else.
    """
    expected = f"expected shares of heads in {path}, as `kvzip-press budgets profile` writes them, or LU-KV's .npy"
    try:
        return _numbers(read_bytes(path, max_bytes=_MAX_BYTES))
    except (OSError, ValueError) as error:  # numpy raises ValueError for what is damaged or would run code
        raise InvalidArgumentError(f"{expected}, got {type(error).__name__}: {error}") from error


def write_shares(path: Path, shares: torch.Tensor, provenance: Mapping[str, Any]) -> None:
    """Writes shares ``[layers, heads]`` and where they come from, whole or not at all.

    Raises:
        CacheFileError: The file cannot be written.
    """
    text = json.dumps({"format": FORMAT, "provenance": dict(provenance), "shares": shares.tolist()}, indent=1)
    with replacing(path, parents=True) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _numbers(data: bytes) -> torch.Tensor:
    """Returns the numbers in a file's bytes."""
    if data.startswith(_NPY):
        values: Any = np.load(io.BytesIO(data), allow_pickle=False)
        if values.dtype.kind != "f":
            raise ValueError(f"numbers of {values.dtype}")
        return torch.from_numpy(values.astype(np.float64))
    found = parse_json(data)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"no JSON with format {FORMAT!r}")
    rows = found.get("shares")
    rows = rows if isinstance(rows, list) else []
    for row in rows:
        if not isinstance(row, list) or not all(type(one) in (int, float) for one in row) or len(row) != len(rows[0]):
            raise ValueError("shares that are no lists of equally many numbers")
    return torch.tensor(rows, dtype=torch.float64)
