"""What must be true of a cache in a file: the same before one is written and after one is read."""

from __future__ import annotations

import reprlib
from itertools import pairwise

import torch

from kvzip_press.cache.codecs.by_name import STORAGES, storage_named
from kvzip_press.cache.codecs.storage import Storage
from kvzip_press.cache.file.record import DTYPES, LIMIT, CacheRecord, LayerRecord
from kvzip_press.errors import CacheFileError, InvalidArgumentError
from kvzip_press.files import digest_of, to_json

MAX_LAYERS = 10_000
_MAX_TURNS = 10_000_000


def check_record(record: CacheRecord) -> None:
    """Raises CacheFileError if the metadata contradict themselves."""
    if record.dtype not in ("BF16", "F16", "F32"):
        raise CacheFileError(f"expected dtype BF16, F16 or F32, got {reprlib.repr(record.dtype)}")
    if record.config_hash != digest_of(to_json(record.config).encode()):
        raise CacheFileError(f"expected the SHA-256 of the config, got {reprlib.repr(record.config_hash)}")
    if record.n_context > record.n_seen:
        raise CacheFileError(f"expected at most the {record.n_seen} tokens seen as context, got {record.n_context}")
    if len(record.layers) > MAX_LAYERS:
        raise CacheFileError(f"expected at most {MAX_LAYERS} layers, got {len(record.layers)}")
    _check_turns(record)
    checked: set[tuple[str, int]] = set()  # lists that layers share are read once
    for index, layer in enumerate(record.layers):
        check_storage(layer.storage)
        _check_rows(layer, record, checked)
        of_pairs = (layer.has_row_index, layer.has_scores, layer.storage != "model")
        ragged_only = any((layer.fingerprint, layer.n_protected, *of_pairs))
        _check_sharing(layer, index, record)
        if (layer.sliding_window > 1) != (layer.kind == "sliding") or (ragged_only and layer.kind != "ragged"):
            raise CacheFileError(f"expected entries that go with a {layer.kind} layer, got {reprlib.repr(layer)}")


def check_storage(name: str) -> None:
    """Raises CacheFileError unless there is a storage of this name, with the parameters behind it."""
    try:
        storage_named(name)
    except InvalidArgumentError as error:
        if name.partition(":")[0] in STORAGES:
            raise CacheFileError(f"storage {name!r:.80}: {error}") from error
        raise CacheFileError(
            f"expected a storage out of {', '.join(STORAGES)}, got {name!r:.80}: of a later version?"
        ) from error


def storage_of(layer: LayerRecord, record: CacheRecord) -> Storage:
    """Returns the storage of a layer.

    Raises:
        CacheFileError: It cannot hold pairs of these widths.
    """
    kind = storage_named(layer.storage)
    try:
        kind.check_widths(layer.head_dim, layer.v_head_dim)
    except InvalidArgumentError as error:
        raise CacheFileError(f"expected pairs that the storage {layer.storage!r} can hold: {error}") from error
    return kind(layer.head_dim, layer.v_head_dim, DTYPES[record.dtype])


def check_pairs(
    cu_seqlens: torch.Tensor, positions: torch.Tensor, layer: LayerRecord, record: CacheRecord, name: str
) -> None:
    """Raises CacheFileError unless each head's pairs are as many as a context can have, at positions that ascend in it.

    Args:
        cu_seqlens: ``[rows * heads + 1]``, integer, where the pairs of each (packed row, head) begin.
        positions: ``[total]``, integer.
        layer: The layer.
        record: The metadata of the cache.
        name: The layer's name in the file.
    """
    bounds = cu_seqlens.long()
    counts = bounds.diff()
    if int(bounds[0]) != 0 or int(bounds[-1]) != len(positions) or bool((counts < 0).any()):
        raise CacheFileError(f"expected '{name}.cu_seqlens' to ascend from 0, got {reprlib.repr(cu_seqlens.tolist())}")
    shortest = [record.n_context - max(0, padding) for padding in layer.n_padding]
    limits = torch.tensor([shortest, layer.context_ends], device=bounds.device).repeat_interleave(layer.num_heads, 1)
    if bool((counts > limits[0]).any()):
        raise CacheFileError(
            f"expected at most as many pairs in '{name}' as the row has tokens, got {int(counts.max())} for a head of "
            f"a context of {record.n_context}"
        )
    begins, lasts, ends = bounds[:-1][counts > 0], bounds[1:][counts > 0] - 1, limits[1][counts > 0]
    steps = positions[1:] > positions[:-1]
    steps[begins[begins > 0] - 1] = True  # between two heads
    outside = bool((positions[begins] < 0).any()) or bool((positions[lasts] >= ends).any())
    if not bool(steps.all()) or outside or (len(positions) and int(positions.max()) >= record.n_positions):
        raise CacheFileError(
            f"expected '{name}.positions' to ascend for each head and to end before {max(layer.context_ends)} and "
            f"{record.n_positions}, got values from {int(positions.min())} to {int(positions.max())}"
        )


def check_numbers(tensor: torch.Tensor, name: str) -> None:
    """Raises CacheFileError if a tensor of floating point holds NaN or an infinity."""
    if tensor.numel() and tensor.is_floating_point():
        low, high = tensor.aminmax()  # NaN if any is; takes no memory
        if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
            raise CacheFileError(f"expected finite numbers in {name!r}, got NaN or infinity")


def _check_sharing(layer: LayerRecord, index: int, record: CacheRecord) -> None:
    """Raises CacheFileError unless a shared layer reads an earlier one of its shape, with pairs of its own."""
    is_shared, source = layer.kind == "shared", layer.shares_with
    read = record.layers[source] if source < index else None
    shape = (layer.num_heads, layer.head_dim, layer.v_head_dim)
    fits = read is not None and read.kind != "shared" and (read.num_heads, read.head_dim, read.v_head_dim) == shape
    if (is_shared and not fits) or (source and not is_shared):
        raise CacheFileError(
            f"expected layers that share to read an earlier one of their shape, with pairs of its own, got layer "
            f"{index}, which is {layer.kind}, with {source}"
        )


def _check_turns(record: CacheRecord) -> None:
    """Raises CacheFileError unless the tails' padding is in range and every row has some tokens of each turn."""
    padding, room = record.tail_padding, record.n_seen - record.n_context
    if len(padding) not in (0, record.batch_size) or not all(0 <= columns <= room for columns in padding):
        raise CacheFileError(
            f"expected 'tail_padding' of 0 to {room} for each of {record.batch_size} rows, got {reprlib.repr(padding)}"
        )
    if len(record.turn_starts) * len(padding) > _MAX_TURNS:  # before each turn is compared for each row
        raise CacheFileError(f"expected at most {_MAX_TURNS} turns of all rows, got {len(record.turn_starts)} of each")
    seen = [record.n_seen - columns for columns in padding or (0,)]
    starts = (start if isinstance(start, list) else [start] * len(seen) for start in record.turn_starts)
    for before, after in pairwise([[-1] * len(seen), *starts, seen]):
        if len(before) != len(after) or any(one >= other for one, other in zip(before, after, strict=True)):
            raise CacheFileError(f"expected turns that begin one after another, got {reprlib.repr(record.turn_starts)}")


def _check_rows(layer: LayerRecord, record: CacheRecord, checked: set[tuple[str, int]]) -> None:
    """Raises CacheFileError unless a layer has as many numbers as packed rows, each in its range."""
    n_rows = len(layer.n_protected)
    if layer.kind == "ragged" and not (n_rows > 0 if layer.has_row_index else n_rows == record.batch_size):
        raise CacheFileError(f"expected 'n_protected' for {record.batch_size} rows, got {n_rows}")
    ranges = {
        "n_protected": (0, record.n_context),
        "n_padding": (-1, record.n_context),
        "context_ends": (0, LIMIT - 1),
    }
    for name, (least, most) in ranges.items():
        numbers = getattr(layer, name)
        known = (name, id(numbers)) in checked
        checked.add((name, id(numbers)))
        if len(numbers) != n_rows or not (known or all(least <= number <= most for number in numbers)):
            raise CacheFileError(
                f"expected {name!r} of {least} to {most} for each of {n_rows} rows, got {reprlib.repr(numbers)}"
            )
