"""The pairs of all compressed layers in one place, so that they can compete while a model generates.

With a budget over all layers, the number of pairs in a layer changes at every eviction, but their total does not. So
the layers are views of one set of columns that is written in place: a captured decode step finds it at the same
addresses, and one merge serves all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvzip_press.cache.codecs.by_name import name_of
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.tail import is_writable
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError
from kvzip_press.kernels.ragged_pack.indices import cumulated


class PairPool:
    """The pairs of several layers with the same heads and batch rows.

    Args:
        layers: Compressed layers whose pairs have scores; they become views of the pool once it has pairs and hands
            them out.

    Attributes:
        packed: All pairs, as those of ``num_layers * batch`` rows, layer by layer; None before the first eviction.
        bounds: Where the pairs of each segment begin and those of the last one end, int64 on the host.
        num_layers: Number of layers.
        batch_size: Batch rows of each layer.
        num_heads: KV heads of each layer.
    """

    def __init__(self, layers: Sequence[RaggedLayer]) -> None:
        self.num_layers, self.batch_size = len(layers), layers[0].batch_size
        self.num_heads = layers[0].packed.num_heads
        self.packed: PackedPairs | None = None
        self.bounds = torch.zeros(1, dtype=torch.int64)

    @classmethod
    def of(cls, layers: Sequence[RaggedLayer]) -> PairPool:
        """Returns the pool that the layers are views of, or a new one.

        Raises:
            CacheMismatchError: The pairs carry no scores.
            UnsupportedCacheError: The layers differ in shape or device, or rows share pairs (beams).
        """
        _check(layers)  # also of layers of a pool, whose rows may have been reordered since
        return pool_of([layer.packed for layer in layers]) or cls(layers)

    def of_layers(self, first: int, last: int) -> PackedPairs:
        """Returns the pairs of the layers from ``first`` on and before ``last``, as views."""
        assert self.packed is not None
        own = slice(first * self.batch_size * self.num_heads, last * self.batch_size * self.num_heads)
        start, stop = int(self.bounds[own.start]), int(self.bounds[own.stop])
        bounds = self.packed.cu_seqlens[own.start : own.stop + 1]
        return self.packed.part(own, slice(start, stop), bounds - start, self)

    def may_be_written(self, lengths: torch.Tensor) -> bool:
        """Whether some layers at a time may be written over, so that segments have these ``lengths`` afterwards."""
        if self.packed is None or not self.packed.total or self.packed.parts:
            return False
        return is_writable(self.packed.positions) and torch.equal(lengths, self.bounds.diff())

    def put(self, new: PackedPairs, lengths: torch.Tensor) -> None:
        """Takes over new pairs, in the memory of the old ones if they fit it.

        Args:
            new: The pairs of all layers.
            lengths: Number of those of each segment, int64 on the host.
        """
        old = self.packed
        if old is None or not is_writable(old.positions) or not _have_one_shape(old, new):
            self.packed = new
        else:
            for place, tensor in zip(old.tensors, new.tensors, strict=True):
                place.copy_(tensor)
        self.bounds = cumulated(lengths)

    def hand_out(self, layers: Sequence[RaggedLayer]) -> None:
        """Gives each layer its pairs, as views, and empties its tail."""
        assert self.packed is not None
        ends = layers[0].next_positions.tolist() if layers[0].tail.padding is not None else layers[0].known_ends
        sizes = self.bounds[:: self.batch_size * self.num_heads].diff().tolist()
        for layer, packed in zip(layers, self.packed.split_rows(sizes, self.batch_size, self), strict=True):
            layer.take(packed, ends)


def pool_of(pairs: Sequence[PackedPairs]) -> PairPool | None:
    """Returns the pool of which these are all layers, in order; None if they are not."""
    pool = pairs[0].pool
    if not isinstance(pool, PairPool) or pool.num_layers != len(pairs) or any(one.pool is not pool for one in pairs):
        return None
    return pool


def _have_one_shape(old: PackedPairs, new: PackedPairs) -> bool:
    return [tensor.shape for tensor in old.tensors] == [tensor.shape for tensor in new.tensors]


def _check(layers: Sequence[RaggedLayer]) -> None:
    def shape(layer: RaggedLayer) -> tuple[Any, ...]:
        return layer.packed.num_rows, layer.packed.num_heads, layer.packed.storage, layer.packed.device

    if any(layer.packed.scores is None for layer in layers):
        raise CacheMismatchError(
            "expected pairs that carry scores, to be evicted while the model writes: a cache that a press with "
            "decoding=True has compressed, got one without scores"
        )
    if any(layer.packed.storage.needs_weights for layer in layers):
        raise UnsupportedCacheError(
            "expected a storage without uniform attention to evict while the model writes, whose scores are none of a "
            f"context, got {name_of(type(layers[0].packed.storage))!r}: take storage='tiers:0.333', say"
        )
    if len({shape(layer) for layer in layers}) > 1 or any(layer.row_index is not None for layer in layers):
        raise UnsupportedCacheError(
            "expected layers of the same rows, heads and dimensions on one device, and no beam search, to evict while "
            f"the model writes, got {sorted({str(shape(layer)) for layer in layers})}"
        )
