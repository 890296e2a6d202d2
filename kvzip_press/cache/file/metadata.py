"""The metadata of a cache file as text, written and read: intact, in bounds, and without contradictions."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvzip_press.cache.file.checks import check_record
from kvzip_press.cache.file.cold_parts import check_cold
from kvzip_press.cache.file.record import FORMAT, LIMIT, TEXT, CacheRecord, ColdRecord, LayerRecord
from kvzip_press.errors import CacheFileError
from kvzip_press.files import check_seal, json_of, opened, to_json
from kvzip_press.untrusted import JSON_BYTES

SHARED = "rows"  # lists of numbers, one for each row, that several layers share
_ROWS = ("n_protected", "n_padding", "context_ends")
_MANY = 300_000  # numbers of rows; with fewer, each layer has its own, as in the files of the first versions
_SINCE = {"has_scores": False, "storage": "model", "shares_with": 0}  # what files of earlier versions do not say
_EXPECTED = "expected a cache that kvzip-press saved, whole"


def text_of(record: CacheRecord) -> str:
    """Returns the metadata as text.

    Raises:
        CacheFileError: The text would be longer than :func:`record_in` reads, because there are too many rows.
    """
    data = {**vars(record), "layers": [dict(vars(layer)) for layer in record.layers]}
    del data["cold"]
    if record.cold:  # a file without is as those of earlier versions
        data["cold"] = [dict(vars(one)) for one in record.cold]
    if sum(len(layer[name]) for layer in data["layers"] for name in _ROWS) > _MANY:
        shared: dict[tuple[int, ...], int] = {}
        for layer in data["layers"]:
            for name in _ROWS:
                layer[name] = shared.setdefault(layer[name], len(shared))
        data[SHARED] = list(shared)
    text = to_json(data)
    if len(text) > JSON_BYTES:
        raise CacheFileError(
            f"expected a cache whose description takes at most {JSON_BYTES} characters, got {len(text)} for "
            f"{record.batch_size} rows: save fewer rows in a file"
        )
    return text


@contextmanager
def opened_cache(path: Path) -> Iterator[Any]:
    """Opens a cache file, mapped into memory; any problem with it inside raises CacheFileError with its path."""
    try:
        _check_is_file(path)
        with opened(path, CacheFileError, _EXPECTED) as file:
            yield file
    except CacheFileError as error:
        raise CacheFileError(f"{path}: {error}") from error


def _check_is_file(path: Path) -> None:
    try:
        is_file = path.is_file()  # False for a folder and for a pipe; opening a pipe would block
    except OSError as error:
        raise CacheFileError(f"{_EXPECTED}, got {type(error).__name__}: {error}") from error
    if not is_file:
        raise CacheFileError("expected a file, got nothing or something else of that name")


def record_in(file: Any) -> CacheRecord:
    """Reads and checks the metadata of an open file.

    Raises:
        CacheFileError: The metadata are not this package's, were changed, or contradict themselves.
    """
    metadata = file.metadata() or {}
    text = metadata.get(TEXT, "")
    if not 0 < len(text) <= JSON_BYTES:
        raise CacheFileError(f"expected metadata {TEXT!r} of 1 to {JSON_BYTES} characters, got {len(text)}")
    check_seal(metadata, TEXT, CacheFileError)
    data = json_of(text, CacheFileError, "expected metadata in JSON")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        data = data if isinstance(data, dict) else {}
        raise CacheFileError(f"expected format {FORMAT}, got {reprlib.repr(data.get('format'))}")
    shared = _shared_rows(data)
    layers = tuple(_layer_record(layer, shared) for layer in _field(data, "layers", list))
    rows = {"turn_starts": _turn_starts(data), "tail_padding": _integers(data, "tail_padding")}
    cold = tuple(map(_cold_record, _field(data, "cold", list) if "cold" in data else ()))
    record: CacheRecord = _checked(CacheRecord, {**data, "layers": layers, "cold": cold, **rows})
    check_record(record)
    check_cold(record)
    return record


def _shared_rows(data: dict[str, Any]) -> list[tuple[int, ...]]:
    lists: list[Any] = _field(data, SHARED, list) if SHARED in data else []
    return [_integers({SHARED: numbers}, SHARED) for numbers in lists]


def _layer_record(data: Any, shared: Sequence[tuple[int, ...]]) -> LayerRecord:
    rows = {name: _rows(data, name, shared) for name in _ROWS}
    record: LayerRecord = _checked(LayerRecord, {**_SINCE, **data, **rows})
    if (
        record.kind not in ("ragged", "sliding", "dense", "shared")
        or min(record.num_heads, record.head_dim, record.v_head_dim) < 1
    ):
        raise CacheFileError(
            f"expected a ragged, sliding, dense or shared layer with heads, got {reprlib.repr(record)}"
        )
    return record


def _cold_record(data: Any) -> ColdRecord:
    record: ColdRecord = _checked(ColdRecord, {**data, "rows": _integers(data, "rows")})
    return record


def _rows(data: Any, name: str, shared: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns a layer's numbers, one for each row: they are in its entry, or their index among the shared ones is."""
    if shared and isinstance(data, dict) and type(data.get(name)) is int:
        index: int = _field(data, name, int)
        if index >= len(shared):
            raise CacheFileError(f"expected {name!r} to be one of {len(shared)} lists, got {index}")
        return shared[index]
    return _integers(data, name)


def _checked(kind: type, data: dict[str, Any]) -> Any:
    """Returns a record, after checking that each field is there and of the type with which its annotation begins."""
    types = {"int": int, "str": str, "bool": bool, "tuple": tuple, "dict": dict}
    return kind(**{f.name: _field(data, f.name, types[str(f.type).partition("[")[0]]) for f in fields(kind)})


def _field(data: Any, name: str, kind: type) -> Any:
    if not isinstance(data, dict):
        raise CacheFileError(f"expected an object with {name!r}, got {reprlib.repr(data)}")
    value: Any = data.get(name)
    in_range = not isinstance(value, int) or 0 <= value < LIMIT
    if type(value) is not kind or not in_range:
        raise CacheFileError(f"expected {name!r} to be of type {kind.__name__}, in range, got {reprlib.repr(value)}")
    return value


def _integers(data: Any, name: str) -> tuple[int, ...]:
    numbers: list[Any] = _field(data, name, list)
    if any(type(number) is not int for number in numbers):
        raise CacheFileError(f"expected integers in {name!r}, got {reprlib.repr(numbers)}")
    return tuple(numbers)


def _turn_starts(data: Any) -> tuple[int | list[int], ...]:
    starts: list[Any] = _field(data, "turn_starts", list)
    numbers = [number for start in starts for number in (start if isinstance(start, list) else [start])]
    if any(type(number) is not int for number in numbers):
        raise CacheFileError(f"expected integers, or lists of them, in 'turn_starts', got {reprlib.repr(starts)}")
    return tuple(starts)
