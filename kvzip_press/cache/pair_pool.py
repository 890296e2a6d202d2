"""The pairs of all compressed layers in one place, so that they can compete while a model generates.

With a budget over all layers, the number of pairs in a layer changes at every eviction, but their total does not. So
the layers are views of one set of columns that is written in place: a captured decode step finds it at the same
addresses, and one merge serves all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.cache.codecs.by_name import name_of
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.tail import is_writable
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError

STAYS = torch.finfo(torch.float32).max
"""The score of a pair that no eviction takes and no budget counts; finite, as files want scores to be."""

NUMBERS_AT_ONCE = 2**24  # of the scores that are laid out together: bounds the memory that takes, whatever the batch
NUMBERS_MERGED = 2**27  # of the keys and values that are merged together: 256 MB in 16 bits


@dataclass(frozen=True)
class Worth:
    """What the pairs of one layer are worth when an eviction is due.

    Attributes:
        packed: fp32 ``[total_kept]``.
        tail: fp32 ``[batch, num_heads, n]``; anything finite at padding.
        carried: Whether the pairs that stay carry it to the next eviction, in place of what they have.
    """

    packed: torch.Tensor
    tail: torch.Tensor
    carried: bool = True


class PairPool:
    """The pairs of several layers with the same heads and batch rows.

    Args:
        layers: Compressed layers whose pairs have scores; they become views of the pool at the first :meth:`evict`.

    Attributes:
        packed: All pairs, as those of ``num_layers * batch`` rows, layer by layer; None before the first eviction.
        num_layers: Number of layers.
        batch_size: Batch rows of each layer.
        num_heads: KV heads of each layer.

    Raises:
        CacheMismatchError: The pairs carry no scores.
        UnsupportedCacheError: The layers differ in shape or device, or rows share pairs (beams).
    """

    def __init__(self, layers: Sequence[RaggedLayer]) -> None:
        self.num_layers, self.batch_size = len(layers), layers[0].batch_size
        self.num_heads = layers[0].packed.num_heads
        self.packed: PackedPairs | None = None
        self._ends: list[int] = []  # where the pairs of each layer begin, and where those of the last one end

    @classmethod
    def of(cls, layers: Sequence[RaggedLayer]) -> PairPool:
        """Returns the pool that the layers are views of, or a new one."""
        _check(layers)  # also of layers of a pool, whose rows may have been reordered since
        pool = layers[0].packed.pool
        known = isinstance(pool, cls) and all(layer.packed.pool is pool for layer in layers)
        return pool if known else cls(layers)

    def evict(
        self,
        by_idx: Mapping[int, RaggedLayer],
        due: torch.Tensor,
        *,
        policy: Policy,
        window_sizes: torch.Tensor,
        worth: Mapping[int, Worth] | None = None,
    ) -> None:
        """Merges the layers' tails into the pool, and cuts rows to what a policy leaves them, protected pairs included.

        The first tokens that no head has lost stay, and so do the last ``window_sizes``. Of the others, exactly those
        stay that a prefill with the same scores would keep under the policy. The tails are empty afterwards. Pairs
        whose score is :data:`STAYS` stay besides.

        Args:
            by_idx: The layers of the pool by layer index, with the tokens that were read since in their tails.
            due: Bool ``[batch]``, the rows to cut.
            policy: How much a row keeps, counting everything that it holds, and how its pairs compete.
            window_sizes: int64 ``[batch]``, the number of last tokens of each row that every head keeps.
            worth: What pairs are worth, by layer; None for the scores that they carry.

        Raises:
            CacheMismatchError: A token of a tail has no score.
        """
        layers = list(by_idx.values())
        tails = [layer.tail for layer in layers]
        sizes = [layer.packed.total for layer in layers]
        packed = numbers_of(layers)
        scores = torch.stack([tail.scores for tail in tails if tail.scores is not None]).flatten(0, 1)
        ends, valid, positions = _columns(layers[0])
        if bool((scores.isnan() & valid.repeat(self.num_layers, 1).unsqueeze(1)).any()):
            raise CacheMismatchError(
                "expected every token since the context to be read inside `with press(model):`, which scores it, got "
                "some that were read outside of it, or whose rows were rearranged before they had a score"
            )
        assert packed.scores is not None
        own, ranks, ranked = packed.scores, packed.scores, scores
        if worth is not None:
            ranks = torch.cat([of_layer.packed for of_layer in worth.values()])
            ranked = torch.cat([of_layer.tail for of_layer in worth.values()])
            if all(of_layer.carried for of_layer in worth.values()):
                own, scores = ranks, ranked
        pairs = self._all_pairs(packed, tuple(by_idx), ranks, ranked, valid, positions)
        first = torch.tensor(layers[0].n_protected, device=ends.device)
        most = int(packed.seqlens.max()) + tails[0].length  # of a head; the columns of a row are at least as many
        n_rows = max(NUMBERS_AT_ONCE // max(self.num_layers * self.num_heads * most, 1), 1)
        kept = pairs.after(due.nonzero()[:, 0].split(n_rows), torch.stack([first, ends - window_sizes], dim=1), policy)
        keep, staying = kept[packed.total :].view_as(scores), kept[: packed.total]
        del pairs
        tail_keep, tail_scores, tail_ranks = (x.unflatten(0, (self.num_layers, -1)) for x in (keep, scores, ranked))
        packed_parts = staying.split(sizes), own.split(sizes)
        merges = Merges(layers, positions, tail_keep, tail_scores, tail_ranks, *packed_parts)
        if self._keeps_its_shape(packed, keep, staying):
            change: Any = InParts(self, merges)
        else:
            total = int(staying.sum() + keep.sum())
            change = PackedPairs.joined((merges.of_layers(part) for part in merges.parts()), total, packed)
        try:
            self._take_over(change, layers)
        except BaseException:  # an interrupt: the old pairs are written over in part, so what has begun is finished
            try:
                self._take_over(change, layers)
            except BaseException:
                for layer in layers:
                    layer.give_up("an eviction failed after it had begun to write")
                raise
            raise

    def _keeps_its_shape(self, packed: PackedPairs, keep: torch.Tensor, staying: torch.Tensor) -> bool:
        """Whether every head has as many pairs after the eviction as before, in a pool that may be written to."""
        if self.packed is None or self.packed.parts or not packed.total or not is_writable(self.packed.positions):
            return False
        stay = torch.nn.functional.pad(staying.long().cumsum(0), (1, 0))[packed.cu_seqlens.long()].diff()
        return torch.equal(stay + keep.sum(dim=-1).flatten(), packed.cu_seqlens.diff().long())

    def _take_over(self, change: PackedPairs | InParts, layers: Sequence[RaggedLayer]) -> None:
        """Changes the pairs of the pool and of its layers; done again after an interrupt, it has the same result."""
        if isinstance(change, InParts):
            change.make()
        else:
            self._put(change)
        self._hand_out(layers)

    def of_layers(self, first: int, last: int) -> PackedPairs:
        """Returns the pairs of the layers from ``first`` on and before ``last``, as views."""
        assert self.packed is not None
        start, stop = self._ends[first], self._ends[last]
        own = slice(first * self.batch_size * self.num_heads, last * self.batch_size * self.num_heads)
        bounds = self.packed.cu_seqlens[own.start : own.stop + 1]
        return self.packed.part(own, slice(start, stop), bounds - start, self)

    def _all_pairs(
        self,
        packed: PackedPairs,
        indices: tuple[int, ...],
        own_scores: torch.Tensor,
        scores: torch.Tensor,
        valid: torch.Tensor,
        positions: torch.Tensor,
    ) -> _Pairs:
        """Returns the packed pairs and, after them, the columns of all tails, with scores ``[rows, heads, n]``."""
        shape = scores.shape
        segments = torch.arange(shape[0] * packed.num_heads, device=scores.device)
        own = segments.repeat_interleave(packed.cu_seqlens.diff().long(), output_size=packed.total)

        def of_tails(columns: torch.Tensor) -> torch.Tensor:
            return columns.repeat(self.num_layers, 1).unsqueeze(1).expand(shape).flatten()

        return _Pairs(
            segment=torch.cat([own, segments.repeat_interleave(shape[2])]),
            position=torch.cat([packed.positions, of_tails(positions)]),
            score=torch.cat([own_scores, scores.flatten()]),
            alive=torch.cat([torch.ones_like(packed.positions, dtype=torch.bool), of_tails(valid)]),
            shape=(self.num_layers, self.batch_size, packed.num_heads),
            indices=indices,
        )

    def _put(self, new: PackedPairs) -> None:
        """Takes over the new pairs, in the memory of the old ones if they fit it."""
        old = self.packed
        if old is None or not is_writable(old.positions) or not _have_one_shape(old, new):
            self.packed = new
        else:
            for place, tensor in zip(old.tensors, new.tensors, strict=True):
                place.copy_(tensor)
        self._ends = new.cu_seqlens[:: self.batch_size * self.num_heads].tolist()

    def _hand_out(self, layers: Sequence[RaggedLayer]) -> None:
        ends = layers[0].next_positions.tolist()
        for number, layer in enumerate(layers):
            layer.take(self.of_layers(number, number + 1), ends)


@dataclass(frozen=True)
class LayerStack:
    """Some layers of a pool as one with the rows of all, layer by layer, so that they take as few kernels as one.

    Attributes:
        layers: The layers, which have read equally many tokens since an eviction.
        packed: Their packed pairs.
        keys: Those of their tails, ``[rows, num_heads, n, head_dim]``; None before a first token.
        values: ``[rows, num_heads, n, v_head_dim]``; None before a first token.
    """

    layers: Sequence[RaggedLayer]
    packed: PackedPairs
    keys: torch.Tensor | None
    values: torch.Tensor | None

    @classmethod
    def of(cls, layers: Sequence[RaggedLayer], part: slice) -> LayerStack:
        """Returns some of the layers of a pool, or of what is to be one, given all of them in order."""
        some = layers[part]
        if len(some) == 1:
            return cls(some, some[0].packed, some[0].tail.keys, some[0].tail.values)
        pairs = [one.packed for one in layers]
        packed = _of_pool(pairs, part)
        if packed is None:
            packed = PackedPairs.joined(pairs[part], sum(one.total for one in pairs[part]), pairs[0])
        keys, values = ([getattr(one.tail, name) for one in some] for name in ("keys", "values"))
        return cls(some, packed, *(None if each[0] is None else torch.cat(each) for each in (keys, values)))


def _of_pool(pairs: Sequence[PackedPairs], part: slice) -> PackedPairs | None:
    """Returns some of the layers of a pool as views, with the scores that they carry; None if they are of none."""
    pool = pairs[0].pool
    if not isinstance(pool, PairPool) or pool.num_layers != len(pairs) or any(one.pool is not pool for one in pairs):
        return None
    scores = [one.scores for one in pairs[part] if one.scores is not None]
    return pool.of_layers(part.start, part.stop).with_scores(torch.cat(scores))


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


@dataclass(frozen=True)
class Merges:
    """What becomes of the layers of a pool: the pairs of each that stay, and those of its tail that do.

    Attributes:
        layers: The layers, as they are before the eviction.
        positions: int32 ``[batch, n]``, of the tails' columns.
        keep: Bool ``[layers, batch, heads, n]``, which pairs of the tails stay.
        scores: fp32 ``[layers, batch, heads, n]``, what these carry from now on.
        importance: fp32, in the same shape: see :class:`~kvzip_press.cache.codecs.held.NewPairs`.
        staying: Bool ``[total_kept]`` of each layer, which of its packed pairs stay.
        carried: fp32 ``[total_kept]`` of each layer, what these carry from now on.
    """

    layers: Sequence[RaggedLayer]
    positions: torch.Tensor
    keep: torch.Tensor
    scores: torch.Tensor
    importance: torch.Tensor
    staying: tuple[torch.Tensor, ...]
    carried: tuple[torch.Tensor, ...]

    def parts(self) -> list[slice]:
        """Returns the layers in parts that are merged together: as many as take little memory beside the pool."""
        packed = self.layers[0].packed
        width = packed.storage.head_dim + packed.storage.v_head_dim
        pairs = (layer.packed.total + self.keep[0].numel() for layer in self.layers)
        return parts_of([n * width for n in pairs], NUMBERS_MERGED)

    def of_layers(self, part: slice) -> PackedPairs:
        """Returns the pairs of some layers after the eviction."""
        stack = LayerStack.of(self.layers, part)
        assert stack.keys is not None and stack.values is not None
        keep, scores, importance = (each[part].flatten(0, 1) for each in (self.keep, self.scores, self.importance))
        return stack.packed.with_scores(torch.cat(self.carried[part])).merge(
            stack.keys,
            stack.values,
            self.positions.repeat(len(stack.layers), 1),
            keep,
            torch.cat(self.staying[part]),
            scores,
            importance=importance,
        )


class InParts:
    """The change of a pool whose heads keep as many pairs as they had: made some layers at a time, in place.

    So no second pool is needed beside the first, which would be most of what an evicting cache takes.

    Args:
        pool: The pool, of which the layers are views.
        merges: What becomes of them.
    """

    def __init__(self, pool: PairPool, merges: Merges) -> None:
        self.pool, self.merges = pool, merges

        def size(part: slice) -> int:
            return sum(len(staying) for staying in merges.staying[part])

        # The largest first: if there is memory for it, there is for the others, which must not fail any more.
        self.left = tuple(sorted(merges.parts(), key=size, reverse=True))
        self.new: tuple[slice, PackedPairs] | None = None  # that of the first of them, once it is there

    def make(self) -> None:
        """Makes what is left of the change. After an interrupt it goes on where it was."""
        while self.left:
            part = self.left[0]
            if self.new is None or self.new[0] != part:
                self.new = part, self.merges.of_layers(part)
            self._write(*self.new)
            self.left = self.left[1:]

    def _write(self, part: slice, new: PackedPairs) -> None:
        for column, tensor in zip(self.pool.of_layers(part.start, part.stop).tensors, new.tensors, strict=True):
            column.copy_(tensor)


def _have_one_shape(old: PackedPairs, new: PackedPairs) -> bool:
    return [tensor.shape for tensor in old.tensors] == [tensor.shape for tensor in new.tensors]


@dataclass(frozen=True)
class _Pairs:
    """Pairs in one list, however they are stored.

    Attributes:
        segment: int64 ``[pairs]``, the (layer, row, head) that each belongs to.
        position: int32 ``[pairs]``.
        score: fp32 ``[pairs]``.
        alive: Bool ``[pairs]``, False at padding.
        shape: Number of layers, rows and heads.
        indices: The layers' indices in the model, which an allocation may look at.
    """

    segment: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor
    alive: torch.Tensor
    shape: tuple[int, int, int]
    indices: tuple[int, ...]

    def after(self, due: Iterable[torch.Tensor], safe: torch.Tensor, policy: Policy) -> torch.Tensor:
        """Returns which pairs stay, bool ``[pairs]``, if the rows that are due are cut, so many at a time."""
        kept = self.alive.clone()
        for rows in due:
            self.cut(kept, rows, safe[rows], policy)
        return kept

    def cut(self, kept: torch.Tensor, rows: torch.Tensor, safe: torch.Tensor, policy: Policy) -> None:
        """Marks in ``kept`` what some rows keep.

        The pairs are laid out like the scores of a span, with a column for each position that any head of a row holds,
        so that the code that spends a prefill's budget can spend this one.

        Args:
            kept: Bool ``[pairs]``, changed in place to False at pairs that go.
            rows: int64 ``[n]``, the rows to cut.
            safe: int64 ``[n, 2]``: in each row, positions before the first number and from the second on stay.
            policy: How much a row keeps, and how its pairs compete.
        """
        layers, batch, heads = self.shape
        slots = self.segment.new_full((batch,), -1)
        slots[rows] = torch.arange(len(rows), device=rows.device)
        slot = slots[self.segment // heads % batch]
        mine = ((slot >= 0) & self.alive).nonzero()[:, 0]
        if not len(mine):
            return
        slot, segment, position = slot[mine], self.segment[mine], self.position[mine].long()
        span = int(position.max()) + 1
        known, which = (slot * span + position).unique(return_inverse=True)
        starts = torch.searchsorted(known, torch.arange(len(rows) + 1, device=known.device) * span)
        column, n_columns = which - starts[slot], int(starts.diff().max())
        place = (segment // (heads * batch), slot, segment % heads, column)
        size = (layers, len(rows), heads, n_columns)
        values = self.score.new_zeros(size).index_put_(place, self.score[mine])
        alive = torch.zeros(size, dtype=torch.bool, device=values.device)
        alive[place] = True
        valid = torch.arange(n_columns, device=known.device) < starts.diff().unsqueeze(1)
        positions = known.new_zeros(len(rows), n_columns).index_put_((slot, column), position)
        stays = (values == STAYS).any(dim=2).any(dim=0)
        protected = valid & (stays | (positions < safe[:, :1]) | (positions >= safe[:, 1:]))

        def selected(indices: Sequence[int], values: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
            scores = Scores(dict(zip(indices, values, strict=True)), protected, policy, protected_count=~stays)
            return torch.stack(list(select(scores, valid, among=dict(zip(indices, alive, strict=True))).values()))

        if type(policy.allocation).heads_alone and bool(values.isfinite().all()):  # if not, it is said in which layer
            of_all = (x.transpose(0, 1).flatten(1, 2)[None] for x in (values, alive))
            keep = selected(self.indices[:1], *of_all)[0].unflatten(1, (layers, heads)).transpose(0, 1)
        else:
            keep = selected(self.indices, values, alive)
        kept[mine] = keep[place]


def _columns(layer: RaggedLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns where a layer's tail ends and what its columns are.

    That is int64 ``[batch]``, the position after each row, and ``[batch, n]`` whether a column is a token (bool) and
    its position (int32).
    """
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


def held_tokens(layers: Sequence[RaggedLayer]) -> torch.Tensor:
    """Returns how many tokens' worth of pairs each row holds, rounded up, int64 ``[batch]``.

    Those whose score is :data:`STAYS` are not counted.
    """
    packed = numbers_of(layers)
    held = (packed.seqlens - staying_pairs(packed)).long().unflatten(0, (len(layers), -1)).sum(dim=(0, 2))
    heads = len(layers) * packed.num_heads
    return (held + heads - 1) // heads + layers[0].n_tail_tokens


def staying_pairs(packed: PackedPairs) -> torch.Tensor:
    """Returns how many pairs of each row and head stay in any case, int64 ``[num_rows, num_heads]``."""
    stays = torch.zeros_like(packed.positions) if packed.scores is None else (packed.scores == STAYS).long()
    sums = torch.nn.functional.pad(stays.long().cumsum(0), (1, 0))
    return sums[packed.cu_seqlens.long()].diff().view(packed.num_rows, packed.num_heads)
