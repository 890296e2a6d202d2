"""The metadata of a cache file, and the checks that they are intact and consistent."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kvzip_press.errors import CacheFileError
from kvzip_press.files import check_seal, digest_of, opened, to_json

FORMAT = 1
TEXT = "kvzip_press"  # key of the safetensors metadata; the text's seal is stored beside it
_LIMIT = 2**31  # no length, count or position of a cache reaches it: positions are int32
_MAXTEXT = 4_000_000
_EXPECTED = "expected a cache that kvzip-press saved, whole"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The settings that determine, with the weights, what keys and values mean. Those that count are listed, not those that
# do not: transformers adds settings in every release, and a file should be readable with the next one.
_SETTINGS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps", "layer_types"),
    *("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("attention_multiplier", "original_max_position_embeddings"),
)


@dataclass(frozen=True)
class LayerRecord:
    """The metadata of one layer.

    Attributes:
        kind: "ragged", "sliding" or "dense".
        num_heads: Number of KV heads.
        head_dim: Width of a key.
        v_head_dim: Width of a value.
        fingerprint: Fingerprint of the attention module that made a ragged layer; empty for other layers.
        n_protected: For each packed row of a ragged layer, the number of first tokens that no head has lost.
        n_padding: For each packed row of a ragged layer, the columns of padding on its left; -1 if there is padding
            elsewhere.
        context_ends: For each packed row of a ragged layer, the position after its context.
        has_row_index: Whether batch rows point to packed rows.
        sliding_window: Window of a sliding layer, in tokens; 0 for other layers.
        has_scores: Whether the pairs of a ragged layer carry scores; False for files that do not say.
    """

    kind: str
    num_heads: int
    head_dim: int
    v_head_dim: int
    fingerprint: str = ""
    n_protected: tuple[int, ...] = ()
    n_padding: tuple[int, ...] = ()
    context_ends: tuple[int, ...] = ()
    has_row_index: bool = False
    sliding_window: int = 0
    has_scores: bool = False


@dataclass(frozen=True)
class CacheRecord:
    """The metadata of a cache.

    Attributes:
        format: Version of the file format.
        kvzip_press: Version of this package that wrote the file; like the next two, for information only.
        transformers: Version of transformers at that time.
        torch: Version of torch at that time.
        press: Description of the press; empty if none was given.
        config: The settings that decide what keys and values mean.
        config_hash: SHA-256 of these settings.
        dtype: Dtype of keys and values, as safetensors names it.
        batch_size: Number of batch rows.
        n_context: Number of tokens of the compressed context.
        n_seen: Number of tokens seen; those from ``n_context`` on are the tail.
        tail_padding: Columns of padding on the left of the tail, by batch row; empty if the rows have never differed.
        n_positions: One more than the largest kept position; more than ``n_context`` if position ids began late.
        turn_starts: Tokens seen before each kept turn: one number, or one for each batch row.
        layers: One record per layer.
        tensors: SHA-256 of each tensor's bytes.
    """

    format: int
    kvzip_press: str
    transformers: str
    torch: str
    press: str
    config: dict[str, Any]
    config_hash: str
    dtype: str
    batch_size: int
    n_context: int
    n_seen: int
    tail_padding: tuple[int, ...]
    n_positions: int
    turn_starts: tuple[int | list[int], ...]
    layers: tuple[LayerRecord, ...]
    tensors: dict[str, str]


def settings_of(config: Any) -> dict[str, Any]:
    """Returns the settings of :data:`_SETTINGS` that are set, and RoPE's, always spelled as in transformers 5."""
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        theta, local = getattr(config, "rope_theta", None), getattr(config, "rope_local_base_freq", None)
        rope = {"rope_type": "default", "rope_theta": theta, **(getattr(config, "rope_scaling", None) or {})}
        if local is not None:
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    partial = getattr(config, "partial_rotary_factor", None) or rope.get("partial_rotary_factor")
    rope = {name: value for name, value in rope.items() if name not in ("partial_rotary_factor", "type")}
    settings |= {"rope_parameters": rope, "partial_rotary_factor": None if partial == 1 else partial}
    plain: dict[str, Any] = _plain(settings)
    return plain


def _plain(value: Any) -> Any:
    """Returns a value as JSON gives it back, with 10000 and 10000.0 alike and without items that are None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str | bool) else str(value)


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
    if not 0 < len(text) <= _MAXTEXT:
        raise CacheFileError(f"expected metadata {TEXT!r} of 1 to {_MAXTEXT} characters, got {len(text)}")
    check_seal(metadata, TEXT, CacheFileError)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CacheFileError(f"expected metadata in JSON, got {type(error).__name__}: {error}") from error
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise CacheFileError(f"expected format {FORMAT}, got {reprlib.repr(data.get('format'))}")
    layers = tuple(_layer_record(layer) for layer in _field(data, "layers", list))
    rows = {"turn_starts": _turn_starts(data), "tail_padding": _integers(data, "tail_padding")}
    record: CacheRecord = _checked(CacheRecord, {**data, "layers": layers, **rows})
    check_record(record)
    return record


def _layer_record(data: Any) -> LayerRecord:
    rows = {name: _integers(data, name) for name in ("n_protected", "n_padding", "context_ends")}
    record: LayerRecord = _checked(LayerRecord, {"has_scores": False, **data, **rows})
    if (
        record.kind not in ("ragged", "sliding", "dense")
        or min(record.num_heads, record.head_dim, record.v_head_dim) < 1
    ):
        raise CacheFileError(f"expected a ragged, sliding or dense layer with heads, got {reprlib.repr(record)}")
    return record


def _checked(kind: type, data: dict[str, Any]) -> Any:
    """Returns a record, after checking that each field is there and of the type with which its annotation begins."""
    types = {"int": int, "str": str, "bool": bool, "tuple": tuple, "dict": dict}
    return kind(**{f.name: _field(data, f.name, types[str(f.type).partition("[")[0]]) for f in fields(kind)})


def _field(data: Any, name: str, kind: type) -> Any:
    if not isinstance(data, dict):
        raise CacheFileError(f"expected an object with {name!r}, got {reprlib.repr(data)}")
    value: Any = data.get(name)
    in_range = not isinstance(value, int) or 0 <= value < _LIMIT
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


def check_record(record: CacheRecord) -> None:
    """Raises CacheFileError if the metadata contradict themselves."""
    if record.dtype not in ("BF16", "F16", "F32"):
        raise CacheFileError(f"expected dtype BF16, F16 or F32, got {reprlib.repr(record.dtype)}")
    if record.config_hash != digest_of(to_json(record.config).encode()):
        raise CacheFileError(f"expected the SHA-256 of the config, got {reprlib.repr(record.config_hash)}")
    if record.n_context > record.n_seen:
        raise CacheFileError(f"expected at most the {record.n_seen} tokens seen as context, got {record.n_context}")
    _check_turns(record)
    for layer in record.layers:
        _check_rows(layer, record)
        ragged_only = any((layer.fingerprint, layer.n_protected, layer.has_row_index, layer.has_scores))
        if (layer.sliding_window > 1) != (layer.kind == "sliding") or (ragged_only and layer.kind != "ragged"):
            raise CacheFileError(f"expected entries that go with a {layer.kind} layer, got {reprlib.repr(layer)}")


def _check_turns(record: CacheRecord) -> None:
    """Raises CacheFileError unless the tails' padding is in range and every row has some tokens of each turn."""
    padding, room = record.tail_padding, record.n_seen - record.n_context
    if len(padding) not in (0, record.batch_size) or not all(0 <= columns <= room for columns in padding):
        raise CacheFileError(
            f"expected 'tail_padding' of 0 to {room} for each of {record.batch_size} rows, got {reprlib.repr(padding)}"
        )
    seen = [record.n_seen - columns for columns in padding or (0,)]
    starts = [start if isinstance(start, list) else [start] * len(seen) for start in record.turn_starts]
    for before, after in pairwise([[-1] * len(seen), *starts, seen]):
        if len(before) != len(after) or any(one >= other for one, other in zip(before, after, strict=True)):
            raise CacheFileError(f"expected turns that begin one after another, got {reprlib.repr(record.turn_starts)}")


def _check_rows(layer: LayerRecord, record: CacheRecord) -> None:
    """Raises CacheFileError unless a layer has as many numbers as packed rows, each in its range."""
    n_rows = len(layer.n_protected)
    if layer.kind == "ragged" and not (n_rows > 0 if layer.has_row_index else n_rows == record.batch_size):
        raise CacheFileError(f"expected 'n_protected' for {record.batch_size} rows, got {n_rows}")
    ranges = {
        "n_protected": (0, record.n_context),
        "n_padding": (-1, record.n_context),
        "context_ends": (0, _LIMIT - 1),
    }
    for name, (least, most) in ranges.items():
        numbers = getattr(layer, name)
        if len(numbers) != n_rows or not all(least <= number <= most for number in numbers):
            raise CacheFileError(
                f"expected {name!r} of {least} to {most} for each of {n_rows} rows, got {reprlib.repr(numbers)}"
            )


def live_tokens(n_seen: int, window: int) -> int:
    """Returns how many tokens a dense layer (window 0) or a sliding one still needs.

    The next token sees itself and these.
    """
    return min(n_seen, window - 1) if window > 1 else n_seen
