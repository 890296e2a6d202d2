"""Keeps the pairs of a context that is read in chunks, which are evicted again and again, so that they can come back.

What a chunk loses depends on the chunks before it only, so in the end some pairs are gone that are better than others
that stayed. So all pairs are kept, evicted or not, and any ratio can be asked of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvzip_press.budget.scores import Scores
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.cache.cold.making import check_can_be_cold, pairs_away, span_of
from kvzip_press.cache.cold.span import ColdSpan
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.errors import InvalidArgumentError


class ChunksKept:
    """The pairs of chunks as they were read, in host memory, until the last one makes a span of them.

    Args:
        storage: The name of how pairs are stored.
        cold: Where they go in the end: "cpu", or the path of a file.
    """

    def __init__(self, storage: str, cold: str | Path) -> None:
        self._storage, self._cold = storage, cold
        self._pairs: dict[int, list[PackedPairs]] = {}
        self._positions: list[torch.Tensor] = []

    def add(self, cache: Any, scores: Scores, positions: torch.Tensor) -> None:
        """Copies the pairs of a chunk, which the cache has just read and not yet evicted.

        Args:
            cache: The cache, of one row, which is only read.
            scores: The scores of the chunk.
            positions: ``[1, chunk]``, int32.

        Raises:
            InvalidArgumentError: The press decides its own counts, or the storage encodes a pair by what else is kept.
        """
        check_can_be_cold(self._cold, scores)
        valid = torch.ones_like(positions, dtype=torch.bool)
        for i, values in scores.layers.items():
            nothing = torch.zeros_like(values, dtype=torch.bool)
            carried = None if scores.to_carry is None else scores.to_carry[i]
            packed = pairs_away(cache.layers[i], nothing, carried, valid, positions, self._storage)
            if type(packed.storage) is not storage_named(self._storage):
                raise InvalidArgumentError(
                    f"expected cold=None in chunks with the storage {self._storage!r}, which encodes a pair by what "
                    "else is kept: take storage='int8', say"
                )
            self._pairs.setdefault(i, []).append(packed.to(torch.device("cpu")))
        self._positions.append(positions)

    def span(self, scores: Scores) -> ColdSpan:
        """Returns the whole context as a span, with scores ``[1, heads, tokens]`` and what is protected of it.

        Raises:
            CacheFileError: The file cannot be written.
        """
        packed = {i: _one_after_another(chunks) for i, chunks in self._pairs.items()}
        positions = torch.cat(self._positions, dim=1)
        valid = torch.ones_like(positions, dtype=torch.bool)
        return span_of(packed, scores, valid=valid, positions=positions, cold=self._cold, in_chunks=True)


def _one_after_another(chunks: Sequence[PackedPairs]) -> PackedPairs:
    """Returns the pairs of chunks of one row as those of one span: each head's in the order of the chunks."""
    segment = torch.cat([chunk.segments_of_entries() for chunk in chunks])
    order = segment.argsort(stable=True)
    columns = {name: torch.cat([chunk.columns[name] for chunk in chunks])[order] for name in chunks[0].columns}
    bounds = torch.bincount(segment, minlength=chunks[0].num_heads).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(bounds, (1, 0)).int()
    return PackedPairs(columns, cu_seqlens, chunks[0].num_heads, chunks[0].storage)
