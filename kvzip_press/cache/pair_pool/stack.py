"""The layers of a pool, some or all of them, as one layer with the rows of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.pair_pool.pool import pool_of
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.kernels.ragged_pack.indices import cumulated


@dataclass(frozen=True)
class LayerStack:
    """Some layers of a pool as one with the rows of all, layer by layer, so that they take as few kernels as one.

    Attributes:
        layers: The layers, which have read equally many tokens since an eviction.
        packed: Their packed pairs.
        keys: Those of their tails, ``[rows, num_heads, n, head_dim]``; None before a first token.
        values: ``[rows, num_heads, n, v_head_dim]``; None before a first token.
        bounds: Where the packed pairs of each segment begin and end, int64 on the host.
    """

    layers: Sequence[RaggedLayer]
    packed: PackedPairs
    keys: torch.Tensor | None
    values: torch.Tensor | None
    bounds: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[RaggedLayer], part: slice) -> LayerStack:
        """Returns some of the layers of a pool, or of what is to be one, given all of them in order."""
        some = layers[part]
        bounds = bounds_of(layers, part)
        if len(some) == 1:
            return cls(some, some[0].packed, some[0].tail.keys, some[0].tail.values, bounds)
        pairs = [one.packed for one in layers]
        packed = _of_pool(pairs, part)
        if packed is None:
            packed = PackedPairs.joined(pairs[part], sum(one.total for one in pairs[part]), pairs[0])
        of_tails = ([getattr(one.tail, name) for one in some] for name in ("keys", "values"))
        keys, values = (None if each[0] is None else torch.cat(each) for each in of_tails)
        return cls(some, packed, keys, values, bounds)


def _of_pool(pairs: Sequence[PackedPairs], part: slice) -> PackedPairs | None:
    """Returns some of the layers of a pool as views, with the scores that they carry; None if they are of none."""
    pool = pool_of(pairs)
    if pool is None:
        return None
    scores = [one.scores for one in pairs[part] if one.scores is not None]
    return pool.of_layers(part.start, part.stop).with_scores(torch.cat(scores))


def bounds_of(layers: Sequence[RaggedLayer], part: slice | None = None) -> torch.Tensor:
    """Returns where the pairs of each segment of some layers begin, if these are joined, and where they end.

    Args:
        layers: All layers of a pool, which knows it, or of what is to be one, which is read from the device.
        part: Which of them; None for all.

    Returns:
        int64 ``[segments + 1]``, on the host.
    """
    part = slice(0, len(layers)) if part is None else part
    pool, n_segments = pool_of([layer.packed for layer in layers]), len(layers[0].packed.cu_seqlens) - 1
    if pool is not None:
        bounds = pool.bounds[part.start * n_segments : part.stop * n_segments + 1]
        return bounds - bounds[0]
    lengths = torch.cat([layer.packed.cu_seqlens.diff() for layer in layers[part]]).cpu()
    return cumulated(lengths)


def marked_pairs(packed: PackedPairs, marks: torch.Tensor) -> torch.Tensor:
    """Returns how many pairs of each segment are marked, int64 ``[segments]``, given bool ``[total_kept]``."""
    return cumulated(marks)[packed.cu_seqlens.long()].diff()


def numbers_of(layers: Sequence[RaggedLayer]) -> PackedPairs:
    """Returns the pairs of layers as one, without keys and values: see :meth:`PackedPairs.numbers_only`."""
    pairs = [layer.packed for layer in layers]
    whole = _of_pool(pairs, slice(0, len(pairs)))
    if whole is not None:
        return whole.numbers_only()
    return PackedPairs.joined((one.numbers_only() for one in pairs), sum(one.total for one in pairs), pairs[0])


def parts_of(sizes: Sequence[int], most: int) -> list[slice]:
    """Returns runs of consecutive numbers, each of one number or of sizes that add up to ``most`` at most."""
    parts, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > start and total + size > most:
            parts.append(slice(start, number))
            start, total = number, 0
        total += size
    return [*parts, slice(start, len(sizes))]
