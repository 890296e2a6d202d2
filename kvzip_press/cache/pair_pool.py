"""The pairs of all compressed layers in one place, so that they can compete while a model writes.

With a budget over all layers, how many pairs a layer keeps changes at every eviction, and how many there are in all
does not. So the layers are views of one set of columns that is written in place: a captured decode step finds it where
it was, and one merge serves all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError


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
        self.packed = PackedPairs.joined([layer.packed for layer in layers])

    @classmethod
    def of(cls, layers: Sequence[RaggedLayer]) -> PairPool:
        """The pool that the layers are views of, or a new one."""
        pool = layers[0].packed.pool
        known = isinstance(pool, cls) and all(layer.packed.pool is pool for layer in layers)
        return pool if known else cls(layers)

    def evict(self, layers: Sequence[RaggedLayer], due: torch.Tensor, *, policy: Policy, window_size: int) -> None:
        """Merges the layers' tails into the pool and cuts rows as a policy says, their protected pairs included.

        The first tokens that no head has lost stay, and the last ``window_size``; of the rest those that win under the
        policy, which are exactly those that a prefill would keep of the same scores. The tails are empty afterwards.

        Args:
            layers: The layers that the pool was made of, with the tokens since.
            due: Bool ``[batch]``, the rows that are cut.
            policy: How much a row keeps, all that it holds counted, and how its pairs compete.
            window_size: Last tokens that every head keeps.

        Raises:
            CacheMismatchError: A token of a tail has no score.
        """
        tails = [layer.tail for layer in layers]
        scores = torch.stack([tail.scores for tail in tails if tail.scores is not None]).flatten(0, 1)
        ends, valid, positions = _columns(layers[0])
        if bool((scores.isnan() & valid.repeat(self.num_layers, 1).unsqueeze(1)).any()):
            raise CacheMismatchError(
                "expected every token since the context to be read inside `with press(model):`, which scores it, got "
                "some that were read outside of it"
            )
        pairs = self._all_pairs(scores, valid, positions)
        kept = pairs.alive.clone()
        for row in due.nonzero()[:, 0].tolist():
            safe = (layers[0].n_protected[row], int(ends[row]) - window_size)
            pairs.cut(kept, row, safe, policy)
        keys, values = (
            torch.stack([getattr(tail, name) for tail in tails]).flatten(0, 1) for name in ("keys", "values")
        )
        every, n_packed = positions.repeat(self.num_layers, 1), self.packed.positions.numel()
        self._put(self.packed.merge(keys, values, every, kept[n_packed:].view_as(scores), kept[:n_packed], scores))
        self._hand_out(layers)

    def _all_pairs(self, scores: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor) -> _Pairs:
        """The packed pairs, and behind them the columns of all tails ``[rows, heads, n]``."""
        packed, shape = self.packed, scores.shape
        assert packed.scores is not None
        segments = torch.arange(shape[0] * packed.num_heads, device=scores.device)
        own = segments.repeat_interleave(packed.cu_seqlens.diff().long(), output_size=packed.positions.numel())

        def of_tails(columns: torch.Tensor) -> torch.Tensor:
            return columns.repeat(self.num_layers, 1).unsqueeze(1).expand(shape).flatten()

        return _Pairs(
            segment=torch.cat([own, segments.repeat_interleave(shape[2])]),
            position=torch.cat([packed.positions, of_tails(positions)]),
            score=torch.cat([packed.scores, scores.flatten()]),
            alive=torch.cat([torch.ones_like(packed.positions, dtype=torch.bool), of_tails(valid)]),
            shape=(self.num_layers, self.batch_size, packed.num_heads),
        )

    def _put(self, new: PackedPairs) -> None:
        """Takes the new pairs, in the memory that is there where they fit it."""
        old = self.packed
        if new.positions.shape != old.positions.shape:
            self.packed = new
            return
        for place, tensor in zip(old.tensors, new.tensors, strict=True):
            place.copy_(tensor)

    def _hand_out(self, layers: Sequence[RaggedLayer]) -> None:
        n_segments = self.batch_size * self.packed.num_heads
        bounds = self.packed.cu_seqlens[::n_segments].tolist()
        segments = self.packed.cu_seqlens.unfold(0, n_segments + 1, n_segments)
        segments = segments - segments[:, :1]
        for layer, start, stop, cu_seqlens in zip(layers, bounds, bounds[1:], segments, strict=False):
            layer.take(self.packed.rows_between(start, stop, cu_seqlens, self))


@dataclass(frozen=True)
class _Pairs:
    """Pairs one after another, however they are stored.

    Attributes:
        segment: int64 ``[pairs]``, which (layer, row, head) each belongs to.
        position: int32.
        score: fp32.
        alive: Bool, False at padding.
        shape: Layers, rows, heads.
    """

    segment: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor
    alive: torch.Tensor
    shape: tuple[int, int, int]

    def cut(self, kept: torch.Tensor, row: int, safe: tuple[int, int], policy: Policy) -> None:
        """Marks in ``kept`` what one row keeps, of which positions before ``safe[0]`` and from ``safe[1]`` on stay.

        The pairs are laid out as the scores of a span are, with a column for each position that any head holds, so that
        the code that spends a prefill's budget spends this one.
        """
        layers, batch, heads = self.shape
        mine = ((self.segment // heads % batch == row) & self.alive).nonzero()[:, 0]
        segment = self.segment[mine]
        head = segment // (heads * batch) * heads + segment % heads
        columns, column = self.position[mine].unique(return_inverse=True)
        size = (layers * heads, columns.numel())
        values = self.score.new_zeros(size).index_put_((head, column), self.score[mine])
        alive = torch.zeros_like(values, dtype=torch.bool).index_put_((head, column), self.alive[mine])
        protected = ((columns < safe[0]) | (columns >= safe[1]))[None]
        spans = [x.view(layers, 1, heads, -1) for x in (values, alive)]
        scores, among = (dict(enumerate(span)) for span in spans)
        every = torch.ones_like(protected)
        keep = select(Scores(scores, protected, policy, protected_count=True), every, among=among)
        kept[mine] = torch.stack(list(keep.values())).view(size)[head, column]


def _columns(layer: RaggedLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the tail: ends int64 ``[batch]``, and ``[batch, n]`` whether a column is a token (bool) and where (int32)."""
    ends = layer.next_positions
    columns = torch.arange(layer.tail.length, device=ends.device)
    padding = 0 if layer.tail.padding is None else layer.tail.padding.unsqueeze(1)
    positions = ends.unsqueeze(1) - layer.tail.length + columns
    return ends, (columns >= padding).expand_as(positions), positions.clamp(min=0).int()


def _check(layers: Sequence[RaggedLayer]) -> None:
    def shape(layer: RaggedLayer) -> tuple[Any, ...]:
        return layer.packed.num_rows, layer.packed.num_heads, layer.packed.storage, layer.packed.device

    if any(layer.packed.scores is None for layer in layers):
        raise CacheMismatchError(
            "expected pairs that carry scores, to be evicted while the model writes: a cache that a press with "
            "decoding=True has compressed, got one without scores"
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
