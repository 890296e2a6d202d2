"""Reads and writes head scores as DuoAttention patterns (https://arxiv.org/abs/2410.10819), to share them both ways.

A pattern is a folder with ``full_attention_heads.tsv``, one row per layer and one column per KV head, and
``config.json`` with ``sink_size`` and ``recent_size``. DuoAttention's sparsity s makes the fraction s of the heads
streaming; it is our ``compression_ratio``.
"""

from __future__ import annotations

import io
import json
import reprlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import replacing
from kvzip_press.heads.scores import HeadScores
from kvzip_press.untrusted import MEGABYTE, parse_json, read_bytes, read_text

HEADS, CONFIG = "full_attention_heads.tsv", "config.json"
_TABLE_BYTES, _CONFIG_BYTES = 16 * MEGABYTE, MEGABYTE
_RANGE = (-1.0, 2.0)  # trained scores are a little outside [0, 1]


def export_duo(scores: HeadScores, folder: str | PathLike[str], sink_size: int = 128, recent_size: int = 256) -> None:
    """Writes scores as a DuoAttention pattern.

    Args:
        scores: The scores.
        folder: Created if it does not exist; the two files in it are replaced.
        sink_size: First tokens that a streaming head keeps.
        recent_size: Last tokens that a streaming head keeps.

    Raises:
        CacheFileError: A file cannot be written; what it was to replace stays.
        InvalidArgumentError: A size is negative, or 2**31 or more; or the scores are all equal or far outside [0, 1].
    """
    sizes = _sizes({"sink_size": sink_size, "recent_size": recent_size}, "arguments")
    target = Path(folder)
    try:
        _checked(scores.values)
    except ValueError as error:
        raise InvalidArgumentError(f"these scores cannot be read as a pattern: {error}") from error
    config = json.dumps({"sink_size": sizes[0], "recent_size": sizes[1]}, indent=2) + "\n"
    rows = ["\t".join(f"{value:.18e}" for value in row) + "\n" for row in scores.values.double().tolist()]
    for name, text in ((HEADS, "".join(rows)), (CONFIG, config)):
        with replacing(target / name, parents=True) as temporary:
            temporary.write_text(text, encoding="utf-8")


def import_duo(folder: str | PathLike[str]) -> tuple[HeadScores, int, int]:
    """Reads a DuoAttention pattern.

    The format has no checksum: a number that was changed to another in range is not noticed.

    Returns:
        The scores (clipped to [0, 1] as in DuoAttention: trained ones are a little outside), sink and recent size.

    Raises:
        InvalidArgumentError: A file is missing or malformed, or the scores are all equal or far outside [0, 1].
    """
    source = Path(folder)
    try:
        values = _table(read_text(source / HEADS, max_bytes=_TABLE_BYTES))
        config = parse_json(read_bytes(source / CONFIG, max_bytes=_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"expected a DuoAttention pattern ({HEADS} and {CONFIG}) in {source}, got {type(error).__name__}: {error}"
        ) from error
    sink_size, recent_size = _sizes(config, str(source / CONFIG))
    provenance = {"method": "duo-attention", "sink_size": str(sink_size), "recent_size": str(recent_size)}
    scores = HeadScores(values.clamp(0, 1), (), provenance)
    return scores, sink_size, recent_size


def _table(text: str) -> torch.Tensor:
    """Returns the numbers of a table, fp64 ``[layers, heads]``. Raises ValueError if they cannot be a pattern's."""
    if not text.strip():
        raise ValueError("expected a row for each layer, got none")
    return _checked(torch.from_numpy(np.loadtxt(io.StringIO(text), delimiter="\t", dtype=np.float64, ndmin=2)))


def _checked(values: torch.Tensor) -> torch.Tensor:
    low, high = _RANGE
    if not values.numel() or not bool(((values >= low) & (values <= high)).all()):  # NaN is in no range
        raise ValueError(f"expected numbers from {low} to {high}, got others or none")
    if values.numel() > 1 and bool((values == values[0, 0]).all()):
        raise ValueError(f"expected numbers that order the heads, got {float(values[0, 0])} for all")
    return values


def _sizes(config: Any, where: str) -> tuple[int, int]:
    sizes: list[Any] = [config.get(name) if isinstance(config, dict) else None for name in ("sink_size", "recent_size")]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**31 for size in sizes):
        raise InvalidArgumentError(
            f"expected sink_size >= 0 and recent_size >= 0 in {where}, got {reprlib.repr(sizes)}"
        )
    return sizes[0], sizes[1]
