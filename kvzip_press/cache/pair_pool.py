"""The pairs of all compressed layers in one storage, so that they can compete while a model writes.

With a budget over all layers, how many pairs a layer keeps changes at every eviction, and how many there are in all
does not. So the layers are views of one storage that is written in place: a captured decode step finds it where it
was, and one merge and one selection serve all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.tail import BLOCK, Tail
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError

ALLOCATIONS = ("global", "layer", "head")


class PairPool:
    """Pairs of some layers with the same heads, batch row for batch row.

    Args:
        layers: Compressed layers whose pairs have scores; they become views of the pool at the first :meth:`evict`.

    Attributes:
        packed: All pairs, as of ``num_layers * batch`` rows, layer by layer.
        num_layers: How many layers.
        batch_size: Batch rows of each.

    Raises:
        CacheMismatchError: Pairs without scores.
        UnsupportedCacheError: Layers of different shape or on different devices, or rows that share pairs (beams).
    """

    def __init__(self, layers: Sequence[RaggedLayer]) -> None:
        _check(layers)
        self.num_layers, self.batch_size = len(layers), layers[0].batch_size
        parts = [layer.packed for layer in layers]
        ends = torch.stack([part.cu_seqlens[-1] for part in parts]).cumsum(0)
        starts = torch.nn.functional.pad(ends, (1, 0))
        cu_seqlens = [part.cu_seqlens[:-1] + start for part, start in zip(parts, starts, strict=False)]
        self.packed = PackedPairs(
            keys=torch.cat([part.keys for part in parts]),
            values=torch.cat([part.values for part in parts]),
            positions=torch.cat([part.positions for part in parts]),
            cu_seqlens=torch.cat([*cu_seqlens, ends[-1:]]).int(),
            num_heads=parts[0].num_heads,
            scores=torch.cat([part.scores for part in parts if part.scores is not None]),
        )

    @classmethod
    def of(cls, layers: Sequence[RaggedLayer]) -> PairPool:
        """The pool that the layers are views of, or a new one."""
        pool = layers[0].packed.pool
        known = isinstance(pool, cls) and all(layer.packed.pool is pool for layer in layers)
        return pool if known else cls(layers)

    def evict(
        self,
        layers: Sequence[RaggedLayer],
        due: torch.Tensor,
        *,
        budget: int,
        window_size: int,
        allocation: str,
    ) -> None:
        """Merges the layers' tails into the pool and cuts rows to their budget, their protected pairs included.

        The first tokens that no head has lost stay, and the last ``window_size`` as far as the budget goes; of the rest
        the best of a row ("global"), of each of its layers ("layer") or of each of its heads ("head"), those of equal
        score by lower position, then layer, then head. The tails are empty afterwards.

        Args:
            layers: The layers that the pool was made of, with the tokens since.
            due: Bool ``[batch]``, the rows that are cut.
            budget: Tokens' worth of pairs that a row keeps: ``budget * heads`` of each layer on average.
            window_size: Last tokens that every head keeps.
            allocation: One of ``ALLOCATIONS``.

        Raises:
            CacheMismatchError: A token of a tail has no score.
            InvalidArgumentError: The protected first tokens leave no room.
        """
        tails = [layer.tail for layer in layers]
        scores = torch.stack([tail.scores for tail in tails if tail.scores is not None]).flatten(0, 1)
        ends, valid, positions = _columns(layers[0])
        if bool((scores.isnan() & valid.repeat(self.num_layers, 1).unsqueeze(1)).any()):
            raise CacheMismatchError(
                "expected every token since the context to be read inside `with press(model):`, which scores it, got "
                "some that were read outside of it"
            )
        room = budget - max(layers[0].n_protected)
        if room < 1:
            raise InvalidArgumentError(
                f"expected a budget of more than the {max(layers[0].n_protected)} protected first tokens, got {budget}"
            )
        kept = _Selection(self, layers[0].n_protected, ends, min(window_size, room - 1)).keep(
            scores, positions, valid, due, budget, allocation
        )
        n_packed = self.packed.keys.shape[0]
        keys, values = (
            torch.stack([getattr(tail, name) for tail in tails]).flatten(0, 1) for name in ("keys", "values")
        )
        every = positions.repeat(self.num_layers, 1)
        self._put(self.packed.merge(keys, values, every, kept[n_packed:].view_as(scores), kept[:n_packed], scores))
        self._hand_out(layers, positions.shape[1], ends)

    def _put(self, new: PackedPairs) -> None:
        """Takes the new pairs, in the storage that is there where they fit it."""
        old = self.packed
        if new.keys.shape != old.keys.shape:
            self.packed = new
            return
        assert new.scores is not None and old.scores is not None
        for place, tensor in zip((*old.tensors, old.scores), (*new.tensors, new.scores), strict=True):
            place.copy_(tensor)

    def _hand_out(self, layers: Sequence[RaggedLayer], n_columns: int, ends: torch.Tensor) -> None:
        packed = self.packed
        assert packed.scores is not None
        n_segments = self.batch_size * packed.num_heads
        bounds = packed.cu_seqlens[::n_segments].tolist()
        segments = packed.cu_seqlens.unfold(0, n_segments + 1, n_segments)
        segments = segments - segments[:, :1]
        context_ends = tuple(ends.tolist())
        for layer, start, stop, cu_seqlens in zip(layers, bounds, bounds[1:], segments, strict=False):
            whole = layer.tail.padding is None
            layer.packed = PackedPairs(
                packed.keys[start:stop], packed.values[start:stop], packed.positions[start:stop], cu_seqlens,
                packed.num_heads, packed.scores[start:stop], self,
            )  # fmt: skip
            layer.n_context += n_columns
            layer.context_ends = context_ends
            layer.n_padding = layer.n_padding if whole else (-1,) * self.batch_size
            layer.tail.truncate(0)


class _Selection:
    """Which pairs of a pool and of the tails behind it stay; all are in one row, the pool's first."""

    def __init__(self, pool: PairPool, n_protected: tuple[int, ...], ends: torch.Tensor, window_size: int) -> None:
        self.pool, self.ends, self.window_size = pool, ends, window_size
        self.n_protected = torch.tensor(n_protected, device=ends.device)

    def keep(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        due: torch.Tensor,
        budget: int,
        allocation: str,
    ) -> torch.Tensor:
        """Bool ``[pairs]``."""
        packed, heads = self.pool.packed, self.pool.packed.num_heads
        assert packed.scores is not None
        n_columns = scores.shape[-1]
        of_segments = torch.arange(scores.shape[0] * heads, device=scores.device)
        lengths = packed.cu_seqlens.diff().long()
        segment = torch.cat([
            of_segments.repeat_interleave(lengths, output_size=packed.keys.shape[0]),
            of_segments.repeat_interleave(n_columns),
        ])  # fmt: skip
        row = segment // heads % self.pool.batch_size

        def of_tails(columns: torch.Tensor) -> torch.Tensor:
            return columns.repeat(self.pool.num_layers, 1).unsqueeze(1).expand(-1, heads, -1).flatten()

        position = torch.cat([packed.positions, of_tails(positions)]).long()
        alive = torch.cat([torch.ones_like(packed.positions, dtype=torch.bool), of_tails(valid)])
        protected = (position < self.n_protected[row]) | (position >= self.ends[row] - self.window_size)
        value = torch.cat([packed.scores, scores.flatten()])
        value = value.masked_fill(protected, torch.inf).masked_fill(~alive, -torch.inf)
        layer = segment // (heads * self.pool.batch_size)
        pools = {"global": row, "layer": layer * self.pool.batch_size + row, "head": segment}[allocation]
        size = budget * heads * {"global": self.pool.num_layers, "layer": 1, "head": 0}[allocation] or budget
        return alive & (protected | ~due[row] | (_rank(pools, value, position) < size))


def _rank(pools: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The place of each pair among those of its pool, from 0: by higher value, then lower position, then as given."""
    order = positions.argsort(stable=True)
    order = order[values[order].argsort(descending=True, stable=True)]
    order = order[pools[order].argsort(stable=True)]
    sizes = torch.bincount(pools)
    before = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    return rank.scatter_(0, order, torch.arange(len(order), device=order.device) - before[pools[order]])


def _columns(layer: RaggedLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the tail: ends int64 ``[batch]``, and ``[batch, n]`` whether a column is a token (bool) and where (int32)."""
    ends = layer.next_positions
    columns = torch.arange(layer.tail.length, device=ends.device)
    padding = 0 if layer.tail.padding is None else layer.tail.padding.unsqueeze(1)
    positions = ends.unsqueeze(1) - layer.tail.length + columns
    return ends, (columns >= padding).expand_as(positions), positions.clamp(min=0).int()


def _check(layers: Sequence[RaggedLayer]) -> None:
    def shape(layer: RaggedLayer) -> tuple[Any, ...]:
        packed = layer.packed
        return packed.num_rows, packed.num_heads, packed.keys.shape[1], packed.values.shape[1], packed.keys.device

    if any(layer.packed.scores is None for layer in layers):
        raise CacheMismatchError(
            "expected pairs that carry scores, to be evicted while the model writes: a cache that a press with "
            "decoding=True has compressed, in memory ever since, got one without scores"
        )
    if len({shape(layer) for layer in layers}) > 1 or any(layer.row_index is not None for layer in layers):
        raise UnsupportedCacheError(
            "expected layers of the same rows, heads and dimensions on one device, and no beam search, to evict while "
            f"the model writes, got {sorted({str(shape(layer)) for layer in layers})}"
        )


def held_tokens(layers: Sequence[RaggedLayer]) -> torch.Tensor:
    """Tokens' worth of pairs that each row holds, rounded up, int64 ``[batch]``."""
    packed = torch.stack([layer.packed.seqlens for layer in layers]).long().sum(dim=(0, 2))
    heads = len(layers) * layers[0].packed.num_heads
    return (packed + heads - 1) // heads + layers[0].n_tail_tokens


def give_back_room(layers: Sequence[RaggedLayer], n_tokens: int) -> None:
    """Frees the buffers of empty tails that hold more than ``n_tokens`` need."""
    for layer in layers:
        if layer.tail.tensors and layer.tail.tensors[0].shape[2] > -(-n_tokens // BLOCK) * BLOCK:
            layer.tail = Tail(scored=True)
