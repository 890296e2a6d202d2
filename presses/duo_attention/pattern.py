"""Reads and writes head scores as DuoAttention patterns (https://arxiv.org/abs/2410.10819), to share them both ways.

A pattern is a folder with ``full_attention_heads.tsv``, one row per layer and one column per KV head, and
``config.json`` with ``sink_size`` and ``recent_size``. DuoAttention's sparsity s makes the fraction s of the heads
streaming; it is our ``compression_ratio``.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.heads.scores import HeadScores

HEADS, CONFIG = "full_attention_heads.tsv", "config.json"


def export_duo(scores: HeadScores, folder: str | PathLike[str], sink_size: int = 128, recent_size: int = 256) -> None:
    """Writes scores as a DuoAttention pattern.

    Args:
        scores: The scores.
        folder: Created if it does not exist; the two files in it are replaced.
        sink_size: First tokens that a streaming head keeps.
        recent_size: Last tokens that a streaming head keeps.

    Raises:
        InvalidArgumentError: A negative size.
    """
    sizes = _sizes({"sink_size": sink_size, "recent_size": recent_size}, "arguments")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    np.savetxt(target / HEADS, scores.values.double().numpy(), fmt="%.18e", delimiter="\t")
    config = {"sink_size": sizes[0], "recent_size": sizes[1]}
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_duo(folder: str | PathLike[str]) -> tuple[HeadScores, int, int]:
    """Reads a DuoAttention pattern.

    Returns:
        The scores (clipped to [0, 1] as in DuoAttention: trained ones are a little outside), sink and recent size.

    Raises:
        InvalidArgumentError: A file is missing or malformed.
    """
    source = Path(folder)
    try:
        values = np.loadtxt(source / HEADS, delimiter="\t", dtype=np.float64, ndmin=2)
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"expected a DuoAttention pattern ({HEADS} and {CONFIG}) in {source}, got {type(error).__name__}: {error}"
        ) from error
    sink_size, recent_size = _sizes(config, str(source / CONFIG))
    provenance = {"method": "duo-attention", "sink_size": str(sink_size), "recent_size": str(recent_size)}
    scores = HeadScores(torch.from_numpy(values).clamp(0, 1), (), provenance)
    return scores, sink_size, recent_size


def _sizes(config: Any, where: str) -> tuple[int, int]:
    sizes: list[Any] = [config.get(name) if isinstance(config, dict) else None for name in ("sink_size", "recent_size")]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise InvalidArgumentError(f"expected sink_size >= 0 and recent_size >= 0 in {where}, got {sizes}")
    return sizes[0], sizes[1]
