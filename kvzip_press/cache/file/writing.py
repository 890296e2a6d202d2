"""Writes a compressed cache to disk as a safetensors file, so that reading one runs no code.

Tensors are named ``<layer>.<part>``. A ragged layer has the columns and tables of its storage (keys and values, or
codes and scales), positions, cu_seqlens, tail_keys and tail_values (live tokens only), row_index, and scores and
tail_scores if its pairs carry them; a layer that stayed dense has keys and values; one that reads another's pairs has
nothing, and its entry says which. For evicted pairs see ``cold_parts.py``. Everything else is one JSON text in
the metadata, with the SHA-256 of every tensor's bytes; the SHA-256 of that text is stored beside it. So any changed
byte is noticed, and the shapes that the file must have are known before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.cache.codecs.by_name import name_of
from kvzip_press.cache.file.checks import check_numbers, check_pairs, check_record
from kvzip_press.cache.file.cold_parts import check_cold, cold_in, cold_parts
from kvzip_press.cache.file.metadata import text_of
from kvzip_press.cache.file.reading import load_layers, read_record
from kvzip_press.cache.file.record import (
    FORMAT,
    NAMES,
    TEXT,
    CacheRecord,
    LayerRecord,
    live_tokens,
    settings_of,
)
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheFileError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.files import digest_of, digest_of_tensor, to_json, write_tensors
from kvzip_press.sharing.layer import SharedLayer, holding
from kvzip_press.version import __version__

__all__ = ["load_layers", "read_record", "save_layers"]


def save_layers(
    path: Path, layers: Sequence[Any], *, config: Any, press: Any = None, turn_starts: Sequence[int | list[int]] = ()
) -> None:
    """Writes the layers of a compressed cache, atomically. Needs host memory for one copy of what it writes.

    Args:
        path: The file; an existing one is replaced.
        layers: Ragged layers, and any dense or sliding ones beside them.
        config: The config that the model's attention modules read.
        press: What compressed the cache: a text, or an object whose ``repr`` is taken. At most 1000 characters are
            stored.
        turn_starts: Tokens seen before each kept turn: one number, or one for each batch row.

    Raises:
        CacheFileError: The file cannot be written, or there are too many rows to describe; an existing file stays as it
            was.
        InvalidArgumentError: The layers have not seen the same tokens, because a forward failed half-way, or none is
            ragged, or :func:`load_layers` would refuse the file: a head's positions do not ascend within the context,
            a key, value or score is NaN or infinite, or some rows, but not all, have forgotten a turn.
        UnsupportedCacheError: A layer is of another kind, or of another dtype than bf16, fp16 and fp32, or evicted
            pairs that are kept went under an allocation without a short name.
    """
    records = [_record_of(layer, layers) for layer in layers]
    tensors = {f"{i}.{part}": tensor for i, layer in enumerate(layers) for part, tensor in _parts_of(layer).items()}
    cold, cold_tensors = cold_in({i: layer for i, layer in enumerate(layers) if isinstance(layer, RaggedLayer)})
    tensors |= cold_tensors
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
    held = holding(layers)
    settings = settings_of(config)
    record = CacheRecord(
        format=FORMAT,
        kvzip_press=__version__,
        transformers=str(compat.TRANSFORMERS_VERSION),
        torch=str(torch.__version__),
        press="" if press is None else str(press if isinstance(press, str) else repr(press))[:1000],
        config=settings,
        config_hash=digest_of(to_json(settings).encode()),
        dtype=_one({NAMES.get(dtype, str(dtype)) for dtype in map(_dtype, held)}, "dtype"),
        batch_size=_one({_batch_size(layer) for layer in held}, "batch size"),
        n_context=_one({layer.n_context for layer in ragged}, "context length"),
        n_seen=_one({int(layer.get_seq_length()) for layer in held}, "number of tokens seen"),
        tail_padding=_tail_padding(ragged[0], turn_starts) if ragged else (),
        n_positions=_position_limit([layer.packed.positions for layer in ragged]),
        turn_starts=tuple(turn_starts),
        layers=tuple(records),
        tensors={name: digest_of_tensor(tensor) for name, tensor in tensors.items()},
        cold=cold,
    )
    if record.dtype not in ("BF16", "F16", "F32"):
        raise UnsupportedCacheError(f"expected a cache in bf16, fp16 or fp32, got {record.dtype}")
    _check(record, tensors)
    for layer in ragged:
        layer.packed.storage.check(layer.packed)
    write_tensors(path, tensors, {TEXT: text_of(record)}, seal=TEXT)


def _check(record: CacheRecord, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InvalidArgumentError if the file would not be read again: nothing is written then."""
    try:
        check_record(record)
        check_cold(record)
        cold_parts(record, lambda name, *_: tensors[name], Path())
        for index, layer in enumerate(record.layers):
            if layer.kind == "ragged":
                cu_seqlens, positions = tensors[f"{index}.cu_seqlens"], tensors[f"{index}.positions"]
                check_pairs(cu_seqlens, positions, layer, record, str(index))
        for name, tensor in tensors.items():
            check_numbers(tensor, name)
    except CacheFileError as error:
        raise InvalidArgumentError(f"this cache would not be read again: {error}") from error


def _record_of(layer: Any, layers: Sequence[Any]) -> LayerRecord:
    if isinstance(layer, SharedLayer):
        read = _record_of(layers[layer.shares_with], layers)
        return LayerRecord("shared", read.num_heads, read.head_dim, read.v_head_dim, shares_with=layer.shares_with)
    if isinstance(layer, RaggedLayer):
        heads, storage = layer.packed.num_heads, layer.packed.storage
        rows = (layer.n_protected, layer.n_padding, layer.context_ends)
        return LayerRecord(
            "ragged",
            heads,
            storage.head_dim,
            storage.v_head_dim,
            layer.fingerprint,
            *rows,
            has_row_index=layer.row_index is not None,
            has_scores=layer.packed.scores is not None,
            storage=name_of(type(storage)),
        )
    kinds: dict[type, str] = {compat.DynamicLayer: "dense", compat.DynamicSlidingWindowLayer: "sliding"}
    if type(layer) not in kinds or not isinstance(layer.keys, torch.Tensor) or layer.keys.dim() != 4:
        raise UnsupportedCacheError(
            f"expected ragged layers, and dense or sliding ones that hold tokens, got {type(layer).__name__}"
        )
    window = int(getattr(layer, "sliding_window", 0) or 0)
    dims = (layer.keys.shape[3], layer.values.shape[3])
    return LayerRecord(kinds[type(layer)], layer.keys.shape[1], *dims, sliding_window=window)


def _parts_of(layer: Any) -> dict[str, torch.Tensor]:
    if isinstance(layer, SharedLayer):
        return {}
    if not isinstance(layer, RaggedLayer):
        live = live_tokens(int(layer.get_seq_length()), int(getattr(layer, "sliding_window", 0) or 0))
        return {"keys": layer.keys[:, :, -live:], "values": layer.values[:, :, -live:]}
    parts = layer.packed.by_name()
    if layer.row_index is not None:
        parts["row_index"] = layer.row_index.long()
    if layer.tail.keys is not None and layer.tail.values is not None and layer.tail.length:
        parts |= {"tail_keys": layer.tail.keys, "tail_values": layer.tail.values}
        parts |= {} if layer.tail.scores is None else {"tail_scores": layer.tail.scores}
    return parts


def _tail_padding(layer: RaggedLayer, turn_starts: Sequence[int | list[int]]) -> tuple[int, ...]:
    if layer.tail.padding is not None:
        return tuple(layer.tail.padding.tolist())
    return (0,) * layer.batch_size if any(isinstance(start, list) for start in turn_starts) else ()


def _dtype(layer: Any) -> torch.dtype:
    dtype: torch.dtype = layer.packed.storage.dtype if isinstance(layer, RaggedLayer) else layer.keys.dtype
    return dtype


def _batch_size(layer: Any) -> int:
    return layer.batch_size if isinstance(layer, RaggedLayer) else int(layer.keys.shape[0])


def _one(values: set[Any], what: str) -> Any:
    if len(values) != 1:
        raise InvalidArgumentError(f"expected layers of one {what}, got {sorted(values)}: truncate the cache first?")
    return values.pop()


def _position_limit(positions: Sequence[torch.Tensor]) -> int:
    kept = torch.cat([tensor.cpu() for tensor in positions])
    if kept.numel() and int(kept.min()) < 0:
        raise InvalidArgumentError(f"expected positions of 0 and more, got {int(kept.min())}")
    return int(kept.max()) + 1 if kept.numel() else 0
