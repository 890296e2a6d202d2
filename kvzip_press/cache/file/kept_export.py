"""Exports the positions that every head kept, as numpy arrays for programs without torch and this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError, UnsupportedCacheError
from kvzip_press.files import replacing


def export_kept(path: Path, layers: Sequence[Any]) -> None:
    """Writes the kept positions of the compressed layers of a cache as ``.npz``, atomically.

    All arrays are int32. For each compressed layer L there are ``layer{L}_positions`` ``[total_kept]``, ordered by
    (packed row, KV head, position), and ``layer{L}_cu_seqlens`` ``[num_rows * num_heads + 1]``, which marks where each
    (row, head) begins. ``num_rows``, ``n_context`` and ``n_seen`` are scalars. A position is the one that the model's
    RoPE used (in a padded row it counts the row's own tokens, if the position ids did); ``n_context`` and ``n_seen``
    count columns, including padding. Every head holds all of the ``n_seen - n_context`` tokens after the context, so
    they are not listed. Layers that were not compressed are absent. To read head ``h`` of row ``r`` of layer 3 back:

        kept = np.load("kept.npz")
        bounds = kept["layer3_cu_seqlens"]
        num_heads = (len(bounds) - 1) // int(kept["num_rows"])
        segment = r * num_heads + h
        positions = kept["layer3_positions"][bounds[segment] : bounds[segment + 1]]

    Args:
        path: The file, which is written under exactly this name.
        layers: The cache's layers.

    Raises:
        CacheFileError: The file cannot be written; an existing one stays as it was.
        InvalidArgumentError: The layers have not seen the same tokens, because a forward failed half-way.
        UnsupportedCacheError: No layer is compressed.
    """
    ragged = {index: layer for index, layer in enumerate(layers) if isinstance(layer, RaggedLayer)}
    if not ragged:
        raise UnsupportedCacheError("expected a cache with ragged layers, got one without any")
    counts = {(layer.packed.num_rows, layer.n_context, layer.get_seq_length()) for layer in ragged.values()}
    if len(counts) != 1:
        raise InvalidArgumentError(
            f"expected layers of one (rows, context, tokens seen), got {sorted(counts)}: truncate the cache first?"
        )
    scalars = zip(("num_rows", "n_context", "n_seen"), counts.pop(), strict=True)
    arrays: dict[str, Any] = {name: np.int32(count) for name, count in scalars}
    for index, layer in ragged.items():
        arrays[f"layer{index}_positions"] = layer.packed.positions.cpu().numpy()
        arrays[f"layer{index}_cu_seqlens"] = layer.packed.cu_seqlens.cpu().numpy()
    with replacing(path) as temporary, temporary.open("wb") as file:  # an open file: numpy adds no suffix to its name
        np.savez(file, **arrays)
