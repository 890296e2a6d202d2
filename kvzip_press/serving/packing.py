"""Makes what a pool holds of a compressed cache, in memory or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.cache.codecs.by_name import name_of
from kvzip_press.cache.codecs.int8 import Int8
from kvzip_press.cache.file.reading import load_layers, load_pairs, pair_counts, read_record
from kvzip_press.cache.file.record import CacheRecord
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.rows import Turns
from kvzip_press.errors import UnsupportedCacheError
from kvzip_press.model.structure import attention_layers, is_first_full
from kvzip_press.serving.arena import ArenaRows, joined_rows, rows_to
from kvzip_press.serving.context import PackedContext
from kvzip_press.serving.rotation import Rotation

ALL_HEADS = slice(None)
_Tail = tuple[torch.Tensor, torch.Tensor]  # keys and values [1, heads, n, head_dim] after the packed ones
_Pairs = tuple[ArenaRows, ArenaRows, torch.Tensor]  # a layer's keys, values and lengths [heads]


@dataclass(frozen=True)
class Packing:
    """How contexts are made into what a pool holds.

    Attributes:
        rotation: How the model turns keys.
        device: The pool's.
        storage: The pool's: "model" takes contexts of any storage, and decodes them; "int8" only those of that storage,
            whose codes it holds as they lie in the file.
    """

    rotation: Rotation
    device: torch.device
    storage: str = "model"


def packed_file(path: Path, model: nn.Module, packing: Packing) -> PackedContext:
    """Reads a context from a file that ``RaggedCache.save`` wrote, with all checks of ``RaggedCache.load``.

    Raises:
        CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache files.
        CacheMismatchError: Another model made the cache, or the model is loaded in another dtype.
        UnsupportedCacheError: It is no cache of one context, compressed in every layer, or not in the pool's storage.
    """
    layers, record = load_layers(path, model, device=packing.device)
    return _packed(layers, Turns.of(record.turn_starts), packing)


def packed_cache(cache: RaggedCache, model: nn.Module, packing: Packing) -> PackedContext:
    """Copies a context from a compressed cache, which stays as it is.

    Raises:
        CacheMismatchError: Another model made the cache.
        UnsupportedCacheError: It is no cache of one context, compressed in every layer, or not in the pool's storage.
    """
    check_one_context(len(cache.layers), sum(1 for _ in cache.ragged_layers()), cache.batch_size)
    fork = cache.fork()
    modules = {attention.layer_idx: attention.module for attention in attention_layers(model)}
    for index, layer in fork.ragged_layers():
        layer.check_module(modules[index], again=is_first_full(modules[index]))
    return _packed(fork.layers, Turns.of(fork.turn_starts), packing)


def packed_pairs(path: Path, packing: Packing, heads: slice = ALL_HEADS) -> PackedContext:
    """Reads a context without its model, for engines that have the model in another form; checks all but that.

    Args:
        path: The file.
        packing: What the pool holds.
        heads: The KV heads that are wanted, for engines that share them among processes.

    Raises:
        CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache files.
        UnsupportedCacheError: It is no cache of one context, compressed in every layer, or not in the pool's storage.
    """
    where = packing.device if heads == ALL_HEADS else torch.device("cpu")  # heads of others do not reach the device
    record, layers = load_pairs(path, where)
    check_one_context(len(record.layers), sum(one.kind == "ragged" for one in record.layers), record.batch_size)
    check_storage(record, packing.storage)
    if any(one.has_row_index for one in record.layers) or any(record.tail_padding):
        raise UnsupportedCacheError(
            "expected a cache whose row is its own, got one of which a row was taken: save it from compress(...)"
        )
    n_tokens = record.layers[0].context_ends[0] + record.n_seen - record.n_context
    pairs = [_pairs_of(*layer, packing, heads) for layer in layers]
    return _joined(pairs, packing, n_tokens, len(record.turn_starts))


def check_storage(record: CacheRecord, storage: str) -> None:
    """Raises UnsupportedCacheError for metadata of a cache that a pool of a storage cannot hold."""
    others = sorted({layer.storage for layer in record.layers if layer.kind == "ragged"} - {storage})
    if storage != "model" and others:
        raise _storage_error(storage, others[0])
    if storage != "model" and record.n_seen > record.n_context:
        raise UnsupportedCacheError(
            f"expected a context without kept turns, which a pool of {storage} would have to encode, got "
            f"{record.n_seen - record.n_context} tokens after the context: serve it from a pool of the model's dtype"
        )


def _storage_error(storage: str, got: str) -> UnsupportedCacheError:
    return UnsupportedCacheError(
        f"expected a context stored as {storage}, as the pool holds it, got one stored as {got}: compress it again "
        f"with storage={storage!r}, or serve it from a pool of the model's dtype"
    )


def pairs_in_file(path: Path) -> int:
    """Returns how many pairs a file's context has, of all layers and heads; only metadata and lengths are read.

    Raises:
        CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache files.
    """
    record = read_record(path)
    n_heads = sum(layer.num_heads for layer in record.layers)
    return int(pair_counts(path).sum()) + n_heads * (record.n_seen - record.n_context)


def pairs_in_cache(cache: RaggedCache) -> int:
    """Returns how many pairs a cache of one context has, of all layers and heads."""
    layers = [layer for _, layer in cache.ragged_layers()]
    kept = sum(int(one.packed.seqlens[0 if one.row_index is None else one.row_index].sum()) for one in layers)
    return kept + sum(one.packed.num_heads * int(one.n_tail_tokens[0]) for one in layers)


def check_one_context(n_layers: int, n_ragged: int, batch_size: int) -> None:
    """Raises UnsupportedCacheError unless a cache has one row and is compressed in every layer."""
    if n_ragged != n_layers or batch_size != 1:
        raise UnsupportedCacheError(
            f"expected a cache of one context that is compressed in every layer, got {batch_size} rows and {n_ragged} "
            f"of {n_layers} layers compressed: save each row by itself (batch_select_indices), and compress all layers"
        )


def _packed(layers: Sequence[Any], turns: Turns, packing: Packing) -> PackedContext:
    check_one_context(len(layers), sum(isinstance(layer, RaggedLayer) for layer in layers), layers[0].batch_size)
    n_tokens = int(layers[0].next_positions[0])
    pairs = []
    for layer in layers:
        packed = layer.packed if layer.row_index is None else layer.packed.select_rows(layer.row_index.tolist())
        tail = None
        if layer.tail.keys is not None and layer.tail.values is not None:
            start = 0 if layer.tail.padding is None else int(layer.tail.padding[0])
            tail = layer.tail.keys[:, :, start:], layer.tail.values[:, :, start:]
        pairs.append(_pairs_of(packed, tail, packing))
    return _joined(pairs, packing, n_tokens, len(turns.starts))


def _joined(layers: Sequence[_Pairs], packing: Packing, n_tokens: int, n_turns: int) -> PackedContext:
    """Returns a context of the keys, the values and the lengths of its layers."""
    keys = [
        packing.rotation.turned(own, index, -n_tokens) if isinstance(own, torch.Tensor) else own
        for index, (own, _, _) in enumerate(layers)
    ]
    lengths = torch.stack([lengths for _, _, lengths in layers]).cpu()
    return PackedContext(joined_rows(keys), joined_rows([own for _, own, _ in layers]), lengths, n_tokens, n_turns)


def _pairs_of(packed: PackedPairs, tail: _Tail | None, packing: Packing, heads: slice = ALL_HEADS) -> _Pairs:
    """Returns the only row's pairs on the pool's device, as the pool holds them.

    They are ordered by head; in each head, the kept pairs of the context come before the tokens after it.
    """
    bounds = [0, *accumulate(packed.seqlens[0].tolist())]
    wanted = range(packed.num_heads)[heads]
    parts: tuple[list[ArenaRows], list[ArenaRows]] = ([], [])
    for own, after, rows in zip(_rows_of(packed, tail, packing.storage), tail or (None, None), parts, strict=True):
        for head in wanted:
            rows.append(own[bounds[head] : bounds[head + 1]])
            rows.extend([] if after is None else [after[0, head]])
    n_after = 0 if tail is None else tail[0].shape[2]
    keys, values = (rows_to(joined_rows(rows), packing.device) for rows in parts)
    return keys, values, (packed.seqlens[0] + n_after)[heads]


def _rows_of(packed: PackedPairs, tail: _Tail | None, storage: str) -> tuple[ArenaRows, ArenaRows]:
    """Returns keys and values as a pool holds them: decoded, or as the codes that they are."""
    if storage == "model":
        return packed.storage.decode(packed)
    if not isinstance(packed.storage, Int8) or (tail is not None and tail[0].shape[2]):
        raise _storage_error(storage, name_of(type(packed.storage)) + (" with kept turns" if tail is not None else ""))
    return packed.storage.codes(packed)
