"""Keeps what an eviction is about to take away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvzip_press.budget.scores import Scores
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Storage
from kvzip_press.cache.cold.place import check_place, put
from kvzip_press.cache.cold.span import BOUNDS, EVERY_SCORE, ColdSpan
from kvzip_press.cache.compressible import last_pairs
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError


def check_can_be_cold(cold: object, scores: Scores) -> None:
    """Raises InvalidArgumentError unless pairs that are evicted by these scores can be kept there and come back."""
    check_place(cold)
    if scores.is_decided:
        raise InvalidArgumentError(
            f"expected cold=None with {scores.press or 'this press'}, which decides itself how many pairs each head "
            f"keeps, got cold={str(cold)!r:.80}: what would come back at another ratio is not known"
        )


def evicted_span(
    cache: Any,
    keep: Mapping[int, torch.Tensor],
    scores: Scores,
    *,
    valid: torch.Tensor,
    positions: torch.Tensor,
    storage: str,
    cold: str | Path,
) -> ColdSpan:
    """Returns what an eviction takes of a span, in host memory or a file. The cache is only read.

    Args:
        cache: A cache whose last tokens are the span, not yet evicted.
        keep: ``layer_idx -> [batch, heads, span]``, bool: the pairs that stay.
        scores: The scores that decided that.
        valid: ``[batch, span]``, bool, False at padding.
        positions: ``[batch, span]``, int32.
        storage: The name of how pairs are stored; layers that are compressed already stay as they are.
        cold: "cpu", or the path of a file.

    Raises:
        CacheFileError: The file cannot be written.
        InvalidArgumentError: It is a later span of a cache whose storage encodes pairs by what else is kept.
    """
    packed = {}
    for i, kept in keep.items():  # each is moved to the host before the next one takes memory of the device
        carried = None if scores.to_carry is None else scores.to_carry[i]
        packed[i] = pairs_away(cache.layers[i], kept, carried, valid, positions, storage).to(torch.device("cpu"))
    return span_of(packed, scores, valid=valid, positions=positions, cold=cold)


def span_of(
    packed: Mapping[int, PackedPairs],
    scores: Scores,
    *,
    valid: torch.Tensor,
    positions: torch.Tensor,
    cold: str | Path,
    in_chunks: bool = False,
) -> ColdSpan:
    """Puts pairs, on the CPU, and all that decides which come back to their place, and returns the span.

    Raises:
        CacheFileError: The file cannot be written.
    """
    tensors = {
        i: {**pairs.columns, BOUNDS: pairs.cu_seqlens, EVERY_SCORE: _copied(scores.layers[i])}
        for i, pairs in packed.items()
    }
    described = {"press": scores.press, "layers": list(packed), "tokens": valid.shape[1], "rows": valid.shape[0]}
    counted = scores.protected_count
    return ColdSpan(
        _copied(valid),
        _copied(positions),
        _copied(scores.protected),
        counted if isinstance(counted, bool) else _copied(counted),
        scores.policy,
        None if scores.uniform is None else _copied(scores.uniform),
        storages={i: pairs.storage for i, pairs in packed.items()},
        columns={i: tuple(pairs.columns) for i, pairs in packed.items()},
        place=put(cold, tensors, described),
        in_chunks=in_chunks,
    )


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy on the CPU, which the caller's tensor may change without."""
    return tensor.detach().to("cpu", copy=True)


def pairs_away(
    layer: Any,
    keep: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor,
    positions: torch.Tensor,
    storage: str,
) -> PackedPairs:
    """Returns the pairs of a layer that an eviction takes, on its device.

    They are stored as the layer stores its own, so they come back as they would have been. Of a storage that encodes
    pairs by what else is kept, all are returned, as the model made them.
    """
    keys, values = last_pairs(layer, keep.shape[2])
    every = valid.to(keys.device)[:, None].expand_as(keep)
    positions = positions.to(keys.device)
    is_later = isinstance(layer, RaggedLayer)
    kind: type[Storage] = type(layer.packed.storage) if is_later else storage_named(storage)
    if not kind.of(keys, values).encodes_alone:
        if is_later:
            raise InvalidArgumentError(
                f"expected cold=None for a later turn of a cache in the storage {kind.__name__}, which encodes a pair "
                "by what else is kept: take storage='int8', say"
            )
        return PackedPairs.pack(keys, values, every, positions, scores, storage=ModelDtype)
    return PackedPairs.pack(keys, values, every & ~keep, positions, scores, storage=kind)
