"""Evicted pairs in a cache file, beside the pairs that stayed: they can come back after the cache was loaded.

Tensors of span ``s`` are named ``cold.<s>.<part>`` (valid and protected positions, those that count towards the budget,
position ids) and ``cold.<s>.<layer>.<part>`` (columns of the evicted pairs, where each head's begin, the scores of all
pairs). They stay in the file when a cache is loaded, and are read when pairs come back.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kvzip_press.budget.allocators.by_name import allocation_of, mapping_of
from kvzip_press.budget.amount import LayerRatios, Tokens, amount_of
from kvzip_press.budget.policy import Policy
from kvzip_press.cache.codecs.held import CU_SEQLENS, POSITIONS
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Storage
from kvzip_press.cache.cold.joining import Places
from kvzip_press.cache.cold.place import InFile
from kvzip_press.cache.cold.span import EVERY_SCORE, ColdPart, ColdSpan
from kvzip_press.cache.file.checks import storage_of
from kvzip_press.cache.file.record import DTYPES, NAMES, TEXT, CacheRecord, ColdRecord
from kvzip_press.cache.packed_pairs import SCORES, PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheFileError, InvalidArgumentError, UnsupportedCacheError

#: Reads a tensor of a file by its name, dtype and shape, on the CPU.
Read = Callable[[str, str, tuple[int, ...]], torch.Tensor]

_MASKS = ("valid", "protected", "counted")
UNIFORM = "uniform"
_SPARE = 2**16  # entries of the table of positions beyond 8 times those of a span: a file says how large it is


def cold_in(layers: Mapping[int, RaggedLayer]) -> tuple[tuple[ColdRecord, ...], dict[str, torch.Tensor]]:
    """Returns what a file says of the evicted pairs that layers keep, and their tensors by name; nothing if none do.

    Raises:
        CacheFileError: They lie in a file that is gone, or was changed.
        UnsupportedCacheError: Layers keep different spans, or were evicted under an allocation without a short name.
    """
    counts = {len(layer.cold) for layer in layers.values()}
    if len(counts) > 1:
        raise UnsupportedCacheError("expected layers that keep the evicted pairs of the same turns")
    records: list[ColdRecord] = []
    tensors: dict[str, torch.Tensor] = {}
    for number in range(counts.pop() if counts else 0):
        parts = {i: layer.cold[number] for i, layer in layers.items()}
        first = next(iter(parts.values()))
        records.append(_record_of(first))
        tensors |= {f"cold.{number}.{name}": tensor for name, tensor in _masks_of(first.span).items()}
        for i, part in parts.items():
            names = (*part.span.columns[i], CU_SEQLENS, EVERY_SCORE)
            tensors |= {f"cold.{number}.{i}.{n}": tensor for n, tensor in part.span.place.read(i, names).items()}
    return tuple(records), tensors


def _record_of(part: ColdPart) -> ColdRecord:
    span, amount = part.span, part.span.policy.amount
    counted = span.protected_count
    if isinstance(amount, Tokens):
        said: dict[str, Any] = {"budget": amount.budget}
    elif isinstance(amount, LayerRatios):
        said = {"layer_ratios": {str(layer): ratio for layer, ratio in amount.items()}}
    else:
        said = {"compression_ratio": amount.compression_ratio}
    try:
        allocation = mapping_of(span.policy.allocation)
    except InvalidArgumentError as error:
        raise UnsupportedCacheError(
            f"{error}, to save a cache that keeps evicted pairs: call forget_evicted() first, on a fork() if they are "
            "still needed here"
        ) from error
    return ColdRecord(
        amount=said,
        allocation=allocation,
        counted="some" if isinstance(counted, torch.Tensor) else "all" if counted else "none",
        rows=part.rows,
        n_rows=span.valid.shape[0],
        n_tokens=span.valid.shape[1],
        in_chunks=span.in_chunks,
        uniform=span.uniform is not None,
    )


def _masks_of(span: ColdSpan) -> dict[str, torch.Tensor]:
    masks = {"valid": span.valid, "protected": span.protected, "counted": span.protected_count}
    bits = {name: mask.to(torch.uint8) for name, mask in masks.items() if isinstance(mask, torch.Tensor)}
    uniform = {} if span.uniform is None else {UNIFORM: span.uniform}
    return {**bits, POSITIONS: span.positions, **uniform}


def cold_names(record: CacheRecord) -> list[str]:
    """Returns the names of all tensors of evicted pairs that a file must have."""
    names = []
    for number, one in enumerate(record.cold):
        masks = [name for name in _MASKS if name != "counted" or one.counted == "some"]
        names += [f"cold.{number}.{name}" for name in (*masks, POSITIONS, *([UNIFORM] if one.uniform else []))]
        for i in _layers(record):
            parts = (*_columns(record, i, _storage(record, i)), CU_SEQLENS, EVERY_SCORE)
            names += [f"cold.{number}.{i}.{name}" for name in parts]
    return names


def check_cold(record: CacheRecord) -> None:
    """Raises CacheFileError if what a file says of evicted pairs contradicts itself or the rest."""
    n_packed = {len(record.layers[i].n_protected) for i in _layers(record)}
    for one in record.cold:
        in_range = all(0 <= row < one.n_rows for row in one.rows) and min(one.n_rows, one.n_tokens) > 0
        if n_packed != {len(one.rows)} or not in_range or one.counted not in ("all", "none", "some"):
            raise CacheFileError(f"expected evicted pairs of the rows of this cache, got {reprlib.repr(one)}")
        _policy(one)


def _policy(one: ColdRecord) -> Policy:
    """Returns the policy that evicted.

    Raises:
        CacheFileError: It is none.
    """
    if not isinstance(one.allocation.get("shares", []), list | tuple):  # a path would be read
        raise CacheFileError(f"expected shares as numbers, got {one.allocation['shares']!r:.80}")
    try:
        amount = dict(one.amount)
        ratios = amount.get("layer_ratios")
        if isinstance(ratios, dict):
            amount["layer_ratios"] = {int(layer[:9]): ratio for layer, ratio in ratios.items()}
        return Policy(amount_of(**amount), allocation_of(one.allocation))
    except (InvalidArgumentError, TypeError, ValueError) as error:
        raise CacheFileError(f"expected the policy of an eviction, got {type(error).__name__}: {error}") from error


def cold_parts(record: CacheRecord, read: Read, path: Path, text: str = "") -> dict[int, tuple[ColdPart, ...]]:
    """Returns the evicted pairs of each layer of a file, as they lie there.

    Args:
        record: The metadata of the file.
        read: Reads its tensors, and compares them with the digests if that is asked for.
        path: The file, from which they are read again when they come back.
        text: Its metadata as text; a writer who only checks has neither yet.

    Raises:
        CacheFileError: They are not the evicted pairs of such a cache.
    """
    spans = [_span(number, record, read, path, text) for number in range(len(record.cold))]
    return {
        i: tuple(ColdPart(span, i, one.rows) for span, one in zip(spans, record.cold, strict=True))
        for i in _layers(record)
    }


def _span(number: int, record: CacheRecord, read: Read, path: Path, text: str) -> ColdSpan:
    one, name = record.cold[number], f"cold.{number}"
    shape = (one.n_rows, one.n_tokens)
    masks = {
        mask: read(f"{name}.{mask}", "U8", shape).bool()
        for mask in _MASKS
        if mask != "counted" or one.counted == "some"
    }
    positions = read(f"{name}.{POSITIONS}", "I32", shape)
    _check_positions(masks["valid"], positions, name)
    places = Places(masks["valid"], positions)
    storages = {i: _storage(record, i) for i in _layers(record)}
    expected: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for i, storage in storages.items():
        tensors = _layer(f"{name}.{i}", one, record, i, storage, read)
        _check_pairs(tensors, storage, record.layers[i].num_heads, places, f"{name}.{i}")
        expected |= {f"{name}.{i}.{part}": (tensor.dtype, tensor.shape) for part, tensor in tensors.items()}
    return ColdSpan(
        masks["valid"],
        positions,
        masks["protected"],
        masks["counted"] if one.counted == "some" else one.counted == "all",
        _policy(one),
        _uniform(read(f"{name}.{UNIFORM}", "F32", shape), name) if one.uniform else None,
        storages=storages,
        columns={i: tuple(_columns(record, i, storage)) for i, storage in storages.items()},
        place=InFile(path.absolute(), text, record.tensors, expected, key=TEXT, prefix=f"{name}."),
        in_chunks=one.in_chunks,
    )


def _uniform(numbers: torch.Tensor, name: str) -> torch.Tensor:
    if not bool((numbers.isfinite() & (numbers > 0)).all()):
        raise CacheFileError(f"expected '{name}.{UNIFORM}' to hold numbers above 0")
    return numbers


def _layer(
    name: str, one: ColdRecord, record: CacheRecord, i: int, storage: Storage, read: Read
) -> dict[str, torch.Tensor]:
    heads = record.layers[i].num_heads
    bounds = read(f"{name}.{CU_SEQLENS}", "I32", (one.n_rows * heads + 1,))
    if int(bounds[0]) != 0 or bool((bounds.long().diff() < 0).any()):
        raise CacheFileError(f"expected '{name}.{CU_SEQLENS}' to ascend from 0, got {reprlib.repr(bounds.tolist())}")
    total = int(bounds[-1])
    columns = {
        column: read(f"{name}.{column}", NAMES[dtype], (total, *shape))
        for column, (dtype, shape) in _columns(record, i, storage).items()
    }
    scores = read(f"{name}.{EVERY_SCORE}", "F32", (one.n_rows, heads, one.n_tokens))
    return {**columns, CU_SEQLENS: bounds, EVERY_SCORE: scores}


def _check_positions(valid: torch.Tensor, positions: torch.Tensor, name: str) -> None:
    """Raises CacheFileError unless each row has tokens, at positions that ascend, and not to any number."""
    known = positions.masked_fill(~valid, -1)
    before = torch.nn.functional.pad(known.cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    ascending = bool(((known > before) | ~valid).all()) and bool((positions[valid] >= 0).all())
    room = 8 * valid.numel() + _SPARE
    if not bool(valid.any(dim=1).all()) or not ascending or (int(known.max()) + 1) * len(valid) > room:
        raise CacheFileError(f"expected '{name}.{POSITIONS}' to ascend over the tokens of each row")


def _check_pairs(
    tensors: Mapping[str, torch.Tensor], storage: Storage, num_heads: int, places: Places, name: str
) -> None:
    """Raises CacheFileError unless each head's evicted pairs are tokens of the span, in order."""
    packed = PackedPairs({POSITIONS: tensors[POSITIONS]}, tensors[CU_SEQLENS], num_heads, storage)
    outside = bool((tensors[POSITIONS] < 0).any())
    found = tensors[POSITIONS] if outside else places.find(packed)
    if bool((found < 0).any()) or bool((found.diff() <= 0).any()):
        raise CacheFileError(f"expected '{name}.{POSITIONS}' to ascend for each head, over tokens of the span")


def _layers(record: CacheRecord) -> Iterable[int]:
    return [i for i, layer in enumerate(record.layers) if layer.kind == "ragged"]


def _columns(record: CacheRecord, i: int, storage: Storage) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    carried: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {SCORES: (torch.float32, ())}
    columns = {**storage.layout().columns, POSITIONS: (torch.int32, ())}
    return {**columns, **(carried if record.layers[i].has_scores else {})}


def _storage(record: CacheRecord, i: int) -> Storage:
    """Returns how a layer's evicted pairs are stored: as the others, or as the model made them."""
    layer = record.layers[i]
    storage = storage_of(layer, record)
    return storage if storage.encodes_alone else ModelDtype(layer.head_dim, layer.v_head_dim, DTYPES[record.dtype])
