"""Gates on disk: one safetensors file, with what is known of them in its metadata. Reading it runs no code.

The metadata is one JSON text under one name: safetensors writes several names in any order, and the same gates are to
give the same file.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import (
    DIGEST,
    FLOATS,
    check_contents,
    check_format,
    digest_of_contents,
    json_of,
    opened,
    tensor_in,
    write_tensors,
)

HEADER, FORMAT, INDICES, LAYERS = "kvzip_press_gates", "format", "layer_indices", "layers"
_EXPECTED = "expected a safetensors file of gates at {}"

States = list[dict[str, torch.Tensor]]


def write(
    path: Path, states: Sequence[Mapping[str, torch.Tensor]], indices: tuple[int, ...], provenance: Mapping[str, str]
) -> None:
    """Writes the state dict of each gate, whole or not at all; the folder is made where it is missing.

    The SHA-256 of tensors and metadata is stored beside them.

    Raises:
        CacheFileError: The file cannot be written.
    """
    tensors = {f"{row}.{name}": tensor.cpu() for row, state in enumerate(states) for name, tensor in state.items()}
    header = {**provenance, INDICES: indices, LAYERS: len(states), FORMAT: 1}
    texts = {HEADER: json.dumps(header, sort_keys=True)}
    write_tensors(path, tensors, {**texts, DIGEST: digest_of_contents(tensors, texts)}, parents=True)


def read(path: Path) -> tuple[States, tuple[int, ...], dict[str, str]]:
    """State dicts, layer indices and provenance of a file of :func:`write`.

    Files of the first versions have no checksum: they are read, and a note is logged.

    Raises:
        InvalidArgumentError: There is no such file, or one of another kind, or it was changed or damaged.
    """
    expected = _EXPECTED.format(path)
    with _opened(path) as (file, header):
        names = list(file.keys())
        tensors = {name: tensor_in(file, name, FLOATS, InvalidArgumentError, expected) for name in names}
        texts = dict(file.metadata())
    digest = texts.pop(DIGEST, None)
    if set(texts) != {HEADER}:  # a checksum whose name is damaged does not make a file an old one
        raise InvalidArgumentError(f"{expected}, got the metadata {reprlib.repr(sorted(texts))}")
    check_contents(tensors, texts, digest, InvalidArgumentError, str(path))
    indices, n_layers = header.pop(INDICES, None), header.pop(LAYERS, None)
    known = isinstance(indices, list) and all(type(index) is int and 0 <= index < 2**31 for index in indices)
    rows = {name.partition(".")[0] for name in names}
    if not known or type(n_layers) is not int or n_layers > len(names) or rows != set(map(str, range(n_layers))):
        raise InvalidArgumentError(f"{expected}, got {reprlib.repr(n_layers)} layers and the tensors of {len(rows)}")
    states: States = [{} for _ in range(n_layers)]
    for name, tensor in tensors.items():
        row, _, part = name.partition(".")
        states[int(row)][part] = tensor
    return states, tuple(indices), {name: str(value) for name, value in header.items() if name != FORMAT}


def read_header(path: Path) -> dict[str, Any]:
    """What a file says of its gates, without reading a tensor, and so without comparing the checksum.

    Raises:
        InvalidArgumentError: There is no such file, or one of another kind.
    """
    with _opened(path) as (_, header):
        return header


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    expected = _EXPECTED.format(path)
    with opened(path, InvalidArgumentError, expected) as file:
        header = json_of((file.metadata() or {}).get(HEADER, "null"), InvalidArgumentError, expected)
        mark = header.get(FORMAT) if isinstance(header, dict) else None
        check_format(mark, 1, file, InvalidArgumentError, f"expected gates of format 1 in {path}", n_named=5)
        yield file, header
