"""Several caches of one context as one batch: asked together, each says what it says alone, in one cache's forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from kvzip_press import RaggedCache
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.padding import left_padded, padding_in
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.decoding.forward import read
from kvzip_press.errors import UnsupportedCacheError
from kvzip_press.model.devices import input_device
from kvzip_press.sharing.layer import SharedLayer


def groups(caches: Sequence[RaggedCache], most_bytes: int) -> Iterator[list[RaggedCache]]:
    """Yields caches, in order, as many at a time as hold no more bytes than this together, but at least one.

    A cache that :func:`joined` refuses comes alone.
    """
    group: list[RaggedCache] = []
    size = 0
    for cache in caches:
        own = cache.resident_bytes
        if group and (size + own > most_bytes or not (can_be_joined(cache) and can_be_joined(group[0]))):
            yield group
            group, size = [], 0
        group.append(cache)
        size += own
    if group:
        yield group


def joined(caches: Sequence[RaggedCache], repeats: int = 1) -> RaggedCache:
    """Returns a cache with a copy of the rows of all, each ``repeats`` times; one alone shares its pairs with it.

    Args:
        caches: Caches of one context that were evicted and have read nothing since; at least one.
        repeats: How often each row comes, in memory once.

    Raises:
        UnsupportedCacheError: There are several, and one has dense layers, or has read something.
    """
    rows = caches[0].fork()
    if len(caches) > 1:
        if not all(map(can_be_joined, caches)):
            raise UnsupportedCacheError(
                "expected caches whose layers are all compressed and that have read nothing since, got another one: "
                "ask it alone"
            )
        rows = RaggedCache([_joined(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)])
    rows.batch_repeat_interleave(repeats)
    return rows


@torch.no_grad()
def log_probabilities_of_all(
    model: Any, caches: Sequence[RaggedCache], questions: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> Iterator[torch.Tensor]:
    """Yields what :func:`kvzip_press.leaderboard.running.agreement.log_probabilities` returns of each, of one forward.

    Nothing leaves these caches while an answer is written, so both are the same up to rounding.

    Args:
        model: The model.
        caches: Caches as :func:`joined` takes them; they stay as they are.
        questions: The ids of each question.
        written: The ids of its answer, at least one.

    Yields:
        Log probabilities, fp64 ``[tokens of all answers, vocabulary]``, answer by answer.
    """
    attach(model)
    asked = [[*question, *answer[:-1]] for question, answer in zip(questions, written, strict=True)] * len(caches)
    ids, valid = left_padded(asked, input_device(model))
    rows = joined(caches, len(questions))
    padding = padding_in(valid, (ids.shape[0], ids.shape[1]))
    logits = read(model, rows, ids, padding=padding, n_last=max(map(len, written)))
    for of_cache in logits.split(len(questions)):
        said = [row[len(row) - len(answer) :] for row, answer in zip(of_cache, written, strict=True)]
        yield torch.cat(said).double().log_softmax(dim=-1)


def can_be_joined(cache: RaggedCache) -> bool:
    """Returns whether :func:`joined` takes a cache beside others."""
    return all(isinstance(layer, SharedLayer) or _is_fresh(layer) for layer in cache.layers)


def _is_fresh(layer: Any) -> bool:
    plain = isinstance(layer, RaggedLayer) and type(layer.packed) is PackedPairs
    return plain and layer.row_index is None and layer.tail.length == 0


def _joined(layers: Sequence[Any]) -> Any:
    first = layers[0]
    if isinstance(first, SharedLayer):
        return SharedLayer(first.shares_with)
    layer, packed = first.fork(), [one.packed for one in layers]
    layer.packed = PackedPairs.joined(packed, sum(one.total for one in packed), packed[0])
    for name in ("n_protected", "n_padding", "context_ends"):
        setattr(layer, name, tuple(chain.from_iterable(getattr(one, name) for one in layers)))
    return layer
