"""Makes what a pool holds of a compressed cache, in memory or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.cache.file.reading import load_layers, load_pairs, pair_counts, read_record
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.rows import Turns
from kvzip_press.errors import UnsupportedCacheError
from kvzip_press.model.structure import attention_layers, is_first_full
from kvzip_press.serving.context import PackedContext
from kvzip_press.serving.rotation import Rotation


def packed_file(path: Path, model: nn.Module, rotation: Rotation, device: torch.device) -> PackedContext:
    """Reads a context from a file that ``RaggedCache.save`` wrote, with all checks of ``RaggedCache.load``.

    Raises:
        CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache files.
        CacheMismatchError: Another model made the cache, or the model is loaded in another dtype.
        UnsupportedCacheError: It is no cache of one context, compressed in every layer.
    """
    layers, record = load_layers(path, model, device=device)
    return _packed(layers, Turns.of(record.turn_starts), rotation, device)


def packed_cache(cache: RaggedCache, model: nn.Module, rotation: Rotation, device: torch.device) -> PackedContext:
    """Copies a context from a compressed cache, which stays as it is.

    Raises:
        CacheMismatchError: Another model made the cache.
        UnsupportedCacheError: It is no cache of one context, compressed in every layer.
    """
    check_one_context(len(cache.layers), sum(1 for _ in cache.ragged_layers()), cache.batch_size)
    fork = cache.fork()
    modules = {attention.layer_idx: attention.module for attention in attention_layers(model)}
    for index, layer in fork.ragged_layers():
        layer.check_module(modules[index], again=is_first_full(modules[index]))
    return _packed(fork.layers, Turns.of(fork.turn_starts), rotation, device)


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


def packed_pairs(path: Path, rotation: Rotation, device: torch.device) -> PackedContext:
    """Reads a context without its model, for engines that have the model in another form; checks all but that.

    Raises:
        CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache files.
        UnsupportedCacheError: It is no cache of one context, compressed in every layer.
    """
    record, layers = load_pairs(path, device)
    check_one_context(len(record.layers), sum(one.kind == "ragged" for one in record.layers), record.batch_size)
    if any(one.has_row_index for one in record.layers) or any(record.tail_padding):
        raise UnsupportedCacheError(
            "expected a cache whose row is its own, got one of which a row was taken: save it from compress(...)"
        )
    n_tokens = record.layers[0].context_ends[0] + record.n_seen - record.n_context
    return _joined([_pairs_of(*layer) for layer in layers], rotation, n_tokens, len(record.turn_starts))


def _packed(layers: Sequence[Any], turns: Turns, rotation: Rotation, device: torch.device) -> PackedContext:
    check_one_context(len(layers), sum(isinstance(layer, RaggedLayer) for layer in layers), layers[0].batch_size)
    n_tokens = int(layers[0].next_positions[0])
    pairs = []
    for layer in layers:
        packed = layer.packed if layer.row_index is None else layer.packed.select_rows(layer.row_index.tolist())
        tail = None
        if layer.tail.keys is not None and layer.tail.values is not None:
            start = 0 if layer.tail.padding is None else int(layer.tail.padding[0])
            tail = layer.tail.keys[:, :, start:], layer.tail.values[:, :, start:]
        pairs.append(tuple(part.to(device) for part in _pairs_of(packed, tail)))
    return _joined(pairs, rotation, n_tokens, len(turns.starts))


def _joined(
    layers: Sequence[tuple[torch.Tensor, ...]], rotation: Rotation, n_tokens: int, n_turns: int
) -> PackedContext:
    """Returns a context of the keys, the values and the lengths of its layers."""
    keys = [rotation.turned(own, index, -n_tokens) for index, (own, _, _) in enumerate(layers)]
    values, lengths = ([layer[part] for layer in layers] for part in (1, 2))
    return PackedContext(torch.cat(keys), torch.cat(values), torch.stack(lengths).cpu(), n_tokens, n_turns)


def _pairs_of(
    packed: PackedPairs, tail: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the only row's keys and values ``[pairs, head_dim]`` in the model's dtype, and int32 ``[heads]``.

    They are ordered by head; in each head, the kept pairs of the context come before the tokens after it.
    """
    lengths = packed.seqlens[0].tolist()
    own_keys, own_values = (decoded.split(lengths) for decoded in packed.storage.decode(packed))
    keys, values = [], []
    for head in range(packed.num_heads):
        keys += [own_keys[head], *([] if tail is None else [tail[0][0, head]])]
        values += [own_values[head], *([] if tail is None else [tail[1][0, head]])]
    n_after = 0 if tail is None else tail[0].shape[2]
    return torch.cat(keys), torch.cat(values), packed.seqlens[0] + n_after
