"""Brings evicted pairs back to a cache, and takes them away again: to what another ratio would have kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvzip_press.budget.amount import Ratio
from kvzip_press.budget.candidates import Masks
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.cache.cold.joining import Places, joined, packed_again
from kvzip_press.cache.cold.span import ColdPart, ColdSpan
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError, UnsupportedCacheError


@torch.no_grad()
def at_ratio(layers: Mapping[int, RaggedLayer], compression_ratio: float, *, grows: bool) -> dict[int, PackedPairs]:
    """Returns the pairs that layers would have if each span had been evicted at another ratio; the layers stay.

    Args:
        layers: The compressed layers of a cache, by layer index.
        compression_ratio: Fraction of pairs removed, in [0, 1).
        grows: Whether pairs may only come back; otherwise they may only go.

    Raises:
        CacheFileError: The file of the evicted pairs is gone, or was changed.
        InvalidArgumentError: The ratio is out of range, or pairs would have to move the other way, or pairs would go
            that nothing else holds.
        UnsupportedCacheError: The cache keeps nothing of what was evicted, or pairs were lost since.
    """
    asked = Ratio(compression_ratio)
    n_spans = _n_spans(layers)
    packed = {i: layer.packed for i, layer in layers.items()}
    changes = []
    for number in range(n_spans):
        parts = {i: layer.cold[number] for i, layer in layers.items()}
        span, rows = next((part.span, list(part.rows)) for part in parts.values())
        places = Places(span.valid[rows], span.positions[rows])
        held = {i: _Held.of(packed[i], part, places) for i, part in parts.items()}
        keep = _selected(parts, asked, {i: pairs.device for i, pairs in packed.items()})
        _check(held, keep, span, compression_ratio, grows=grows)
        changes.append((held, keep))
    for held, keep in changes:  # all spans can go that way
        for i, of_layer in held.items():
            packed[i] = of_layer.with_kept(packed[i], keep[i])
    return packed


def _n_spans(layers: Mapping[int, RaggedLayer]) -> int:
    counts = {len(layer.cold) for layer in layers.values()}
    if counts == {0} or not counts:
        raise UnsupportedCacheError(
            "expected a cache that keeps what was evicted, from compress(..., cold='cpu') or prefill.evict(..., "
            "cold='cpu'), got one that does not"
        )
    if len(counts) > 1 or any(layer.packed.pool is not None for layer in layers.values()):
        raise UnsupportedCacheError(
            "expected a cache whose pairs went in prefills alone, got one from which pairs were evicted while the "
            "model generated"
        )
    return counts.pop()


def _selected(parts: Mapping[int, ColdPart], asked: Ratio, devices: Mapping[int, torch.device]) -> Masks:
    """Returns what a span keeps at a ratio, by the code that evicted it."""
    first = next(iter(parts.values()))
    span, rows = first.span, list(first.rows)
    counted = span.protected_count
    scores = Scores(
        {i: part.scores().to(devices[i]) for i, part in parts.items()},
        span.protected[rows],
        Policy(asked, span.policy.allocation),
        protected_count=counted if isinstance(counted, bool) else counted[rows],
    )
    return select(scores, span.valid[rows])


def _check(held: Mapping[int, _Held], keep: Masks, span: ColdSpan, ratio: float, *, grows: bool) -> None:
    """Raises an error unless a span can go the way that was asked for."""
    lost, gone, back, for_good = (
        sum(int(mask.sum()) for mask in masks)
        for masks in zip(*(of_layer.differences(keep[i]) for i, of_layer in held.items()), strict=True)
    )
    if span.in_chunks:  # some come and others go: what counts is how many there are then
        gone, back = max(gone - back, 0), max(back - gone, 0)
    if lost:
        raise UnsupportedCacheError(
            "expected each pair of the context in the cache or among the evicted ones, got "
            f"{lost} that are in neither: they were evicted while the model generated"
        )
    if for_good:
        raise InvalidArgumentError(
            f"expected a ratio under which everything stays that stayed at first, under {span.policy.amount}, got "
            f"{ratio}, which would take {for_good} pairs away that nothing else holds"
        )
    if grows and gone:
        raise InvalidArgumentError(
            f"restore({ratio}): expected a ratio that brings pairs back, got one that takes {gone} away: shrink does"
        )
    if not grows and back:
        raise InvalidArgumentError(
            f"shrink({ratio}): expected a ratio that takes pairs away, got one that brings {back} back: restore does"
        )


@dataclass(frozen=True)
class _Held:
    """Where the pairs of a span are now, in one layer; masks are ``[rows, heads, span]``, on the layer's device.

    Attributes:
        part: The layer's part of the span.
        places: Which column of the span each pair of the cache is.
        hot: The pairs that are in the cache.
        cold: The pairs that are among the evicted ones, which may be in the cache, too.
    """

    part: ColdPart
    places: Places
    hot: torch.Tensor
    cold: torch.Tensor

    @classmethod
    def of(cls, packed: PackedPairs, part: ColdPart, places: Places) -> _Held:
        """Looks up where the pairs of a span are."""
        cold = places.mask(part.pairs(only_positions=True))
        return cls(part, places, places.mask(packed), cold.to(packed.device))

    def differences(self, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns which pairs are nowhere, would go, would come back, and would go with nothing else to hold them."""
        every = self.places.valid.to(keep.device)[:, None].expand_as(keep)
        gone = self.hot & ~keep
        return every & ~self.hot & ~self.cold, gone, keep & ~self.hot, gone & ~self.cold

    def with_kept(self, packed: PackedPairs, keep: torch.Tensor) -> PackedPairs:
        """Returns the pairs of the layer, of which those of the span are now the kept ones."""
        if torch.equal(self.hot, keep):
            return packed
        if packed.storage.encodes_alone:
            return joined(packed, self.part.pairs(), self.places, keep, keep & ~self.hot)
        return packed_again(packed, self.part, self.places, keep)
