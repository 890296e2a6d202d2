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
MOST_POSITIONS = 2**22  # with a column each; if positions began later, only those that are held have one
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
        bounds: Where the pairs of each segment begin and those of the last one end, int64 on the host.
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
        self.bounds = torch.zeros(1, dtype=torch.int64)

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
        packed, before = numbers_of(layers), bounds_of(layers).diff()
        scores = torch.stack([tail.scores for tail in tails if tail.scores is not None]).flatten(0, 1)
        ends, valid, positions = _columns(layers[0])
        is_missing = (scores.isnan() & valid.repeat(self.num_layers, 1).unsqueeze(1)).any()
        *are_due, is_missing_some = torch.cat([due, is_missing[None]]).tolist()
        if is_missing_some:
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
        pairs = self._all_pairs(packed, layers, tuple(by_idx), ranks, ranked, valid, positions)
        most = int(before.max()) + tails[0].length  # of a head; the columns of a row are at least as many
        n_columns = min(pairs.span or 1, MOST_POSITIONS)
        n_rows = max(NUMBERS_AT_ONCE // max(self.num_layers * self.num_heads * most, n_columns), 1)
        rows = torch.tensor(are_due).nonzero()[:, 0].to(ends.device, non_blocking=True)
        first = torch.tensor(layers[0].n_protected).to(ends.device, non_blocking=True)
        kept = pairs.after(rows.split(n_rows), torch.stack([first, ends - window_sizes], dim=1), policy)
        keep, staying = kept[packed.total :].view_as(scores), kept[: packed.total]
        del pairs
        stay = torch.nn.functional.pad(staying.cumsum(0), (1, 0))[packed.cu_seqlens.long()].diff()
        lengths = (stay + keep.sum(dim=-1).flatten()).cpu()
        totals = lengths.view(self.num_layers, -1).sum(dim=1).tolist()
        tail_keep, tail_scores, tail_ranks = (x.unflatten(0, (self.num_layers, -1)) for x in (keep, scores, ranked))
        packed_parts = staying.split(sizes), own.split(sizes)
        merges = Merges(layers, positions, tail_keep, tail_scores, tail_ranks, *packed_parts, totals)
        if packed.total and self._may_be_written() and torch.equal(lengths, before):
            change: Any = InParts(self, merges)
        else:
            change = PackedPairs.joined((merges.of_layers(part) for part in merges.parts()), sum(totals), packed)
        self._make(change, lengths, layers)

    def _make(self, change: PackedPairs | InParts, lengths: torch.Tensor, layers: Sequence[RaggedLayer]) -> None:
        """Makes a change, after which segments have these ``lengths``, or makes later uses of the layers raise."""
        try:
            self._take_over(change, lengths, layers)
        except BaseException:  # an interrupt: the old pairs are written over in part, so what has begun is finished
            try:
                self._take_over(change, lengths, layers)
            except BaseException:
                for layer in layers:
                    layer.give_up("an eviction failed after it had begun to write")
                raise
            raise

    def _may_be_written(self) -> bool:
        """Whether the pool may be changed some layers at a time, if every head keeps as many pairs as it has."""
        return self.packed is not None and not self.packed.parts and is_writable(self.packed.positions)

    def _take_over(self, change: PackedPairs | InParts, lengths: torch.Tensor, layers: Sequence[RaggedLayer]) -> None:
        """Changes the pairs of the pool and of its layers; done again after an interrupt, it has the same result."""
        if isinstance(change, InParts):
            change.make()
        else:
            self._put(change)
            self.bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self._hand_out(layers)

    def of_layers(self, first: int, last: int) -> PackedPairs:
        """Returns the pairs of the layers from ``first`` on and before ``last``, as views."""
        assert self.packed is not None
        own = slice(first * self.batch_size * self.num_heads, last * self.batch_size * self.num_heads)
        start, stop = int(self.bounds[own.start]), int(self.bounds[own.stop])
        bounds = self.packed.cu_seqlens[own.start : own.stop + 1]
        return self.packed.part(own, slice(start, stop), bounds - start, self)

    def _all_pairs(
        self,
        packed: PackedPairs,
        layers: Sequence[RaggedLayer],
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
            segment=torch.cat([own, segments.unsqueeze(1).expand(-1, shape[2]).flatten()]),
            position=torch.cat([packed.positions, of_tails(positions)]),
            score=torch.cat([own_scores, scores.flatten()]),
            alive=torch.cat([torch.ones_like(packed.positions, dtype=torch.bool), of_tails(valid)]),
            shape=(self.num_layers, self.batch_size, packed.num_heads),
            indices=indices,
            span=max(max(layer.context_ends) for layer in layers) + layers[0].tail.length,
        )

    def _put(self, new: PackedPairs) -> None:
        """Takes over the new pairs, in the memory of the old ones if they fit it."""
        old = self.packed
        if old is None or not is_writable(old.positions) or not _have_one_shape(old, new):
            self.packed = new
        else:
            for place, tensor in zip(old.tensors, new.tensors, strict=True):
                place.copy_(tensor)

    def _hand_out(self, layers: Sequence[RaggedLayer]) -> None:
        assert self.packed is not None
        ends = layers[0].next_positions.tolist() if layers[0].tail.padding is not None else layers[0].known_ends
        sizes = self.bounds[:: self.batch_size * self.num_heads].diff().tolist()
        for layer, packed in zip(layers, self.packed.split_rows(sizes, self.batch_size, self), strict=True):
            layer.take(packed, ends)


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


def _pool_of(pairs: Sequence[PackedPairs]) -> PairPool | None:
    """Returns the pool of which these are all layers, in order; None if they are not."""
    pool = pairs[0].pool
    if not isinstance(pool, PairPool) or pool.num_layers != len(pairs) or any(one.pool is not pool for one in pairs):
        return None
    return pool


def _of_pool(pairs: Sequence[PackedPairs], part: slice) -> PackedPairs | None:
    """Returns some of the layers of a pool as views, with the scores that they carry; None if they are of none."""
    pool = _pool_of(pairs)
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
    pool, n_segments = _pool_of([layer.packed for layer in layers]), len(layers[0].packed.cu_seqlens) - 1
    if pool is not None:
        bounds = pool.bounds[part.start * n_segments : part.stop * n_segments + 1]
        return bounds - bounds[0]
    lengths = torch.cat([layer.packed.cu_seqlens.diff() for layer in layers[part]]).cpu()
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int64), (1, 0))


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
        totals: Of each layer, how many pairs it has after the eviction.
    """

    layers: Sequence[RaggedLayer]
    positions: torch.Tensor
    keep: torch.Tensor
    scores: torch.Tensor
    importance: torch.Tensor
    staying: tuple[torch.Tensor, ...]
    carried: tuple[torch.Tensor, ...]
    totals: Sequence[int]

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
            total=sum(self.totals[part]),
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
        span: A number above all positions; None if the host knows none.
    """

    segment: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor
    alive: torch.Tensor
    shape: tuple[int, int, int]
    indices: tuple[int, ...]
    span: int | None = None

    def after(self, due: Iterable[torch.Tensor], safe: torch.Tensor, policy: Policy) -> torch.Tensor:
        """Returns which pairs stay, bool ``[pairs]``, if the rows that are due are cut, so many at a time."""
        kept = self.alive.clone()
        for rows in due:
            if len(rows):
                self.cut(kept, rows, safe[rows], policy)
        return kept

    def _numbered(self) -> tuple[torch.Tensor, int]:
        """Returns a number for the position of each pair, in their order, and one that is above all."""
        if self.span is not None and self.span <= MOST_POSITIONS:
            return self.position.long(), self.span
        known, where = self.position.long().unique(return_inverse=True)  # waits for the device, and sorts
        return where, len(known)

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
        device, n_rows = rows.device, len(rows)
        where, span = self._numbered()
        segments = torch.arange(layers * batch * heads, device=device)
        slots = segments.new_full((batch,), n_rows)  # what is not cut is laid out as one more row, not looked at
        slots[rows] = torch.arange(n_rows, device=device)
        slots = slots[segments // heads % batch]
        slot = slots[self.segment].where(self.alive, n_rows)
        which = slot * span + where
        is_there = torch.zeros(n_rows + 1, span, dtype=torch.bool, device=device)
        is_there.view(-1).index_fill_(0, which, True)
        columns = is_there.cumsum(dim=1, dtype=torch.int32)
        counts = columns[:n_rows, -1:]
        finite = (self.score.isfinite() | (slot == n_rows)).all()
        n_columns, is_finite = torch.stack([counts.max(), finite]).tolist()
        if not n_columns:
            return
        column = (columns.view(-1)[which] - 1).clamp_(max=n_columns - 1)
        begins = (segments // (heads * batch) * (n_rows + 1) * heads + segments % heads) * n_columns
        place = begins[self.segment] + slot * (heads * n_columns) + column
        laid_out = self.score.new_zeros(layers, n_rows + 1, heads, n_columns)
        laid_out.view(-1).index_copy_(0, place, self.score)
        is_pair = torch.zeros_like(laid_out, dtype=torch.bool)
        is_pair.view(-1).index_fill_(0, place, True)
        values, alive = laid_out[:, :n_rows], is_pair[:, :n_rows]
        valid = torch.arange(n_columns, device=device) < counts
        positions = segments.new_zeros((n_rows + 1) * n_columns)
        positions = positions.index_copy_(0, slot * n_columns + column, self.position.long()).view(-1, n_columns)
        stays = (values == STAYS).any(dim=2).any(dim=0)
        protected = valid & (stays | (positions[:n_rows] < safe[:, :1]) | (positions[:n_rows] >= safe[:, 1:]))

        def selected(indices: Sequence[int], values: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
            scores = Scores(dict(zip(indices, values, strict=True)), protected, policy, protected_count=~stays)
            return torch.stack(list(select(scores, valid, among=dict(zip(indices, alive, strict=True))).values()))

        if type(policy.allocation).heads_alone and is_finite:  # if not, it is said in which layer
            of_all = (x.transpose(0, 1).flatten(1, 2)[None] for x in (values, alive))
            keep = selected(self.indices[:1], *of_all)[0].unflatten(1, (layers, heads)).transpose(0, 1)
        else:
            keep = selected(self.indices, values, alive)
        is_pair.fill_(True)[:, :n_rows] = keep
        kept &= is_pair.view(-1)[place]


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
