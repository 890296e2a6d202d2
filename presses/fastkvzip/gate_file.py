"""Gates on disk: one safetensors file, with what is known of them in its metadata. Reading it runs no code.

The metadata is one JSON text under one name: safetensors writes several names in any order, and the same gates are to
give the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import check_format, opened, write_tensors

HEADER, FORMAT, INDICES, LAYERS = "kvzip_press_gates", "format", "layer_indices", "layers"

States = list[dict[str, torch.Tensor]]


def write(
    path: Path, states: Sequence[Mapping[str, torch.Tensor]], indices: tuple[int, ...], provenance: Mapping[str, str]
) -> None:
    """Writes the state dict of each gate, whole or not at all; the folder is made where it is missing.

    Raises:
        CacheFileError: The file cannot be written.
    """
    tensors = {f"{row}.{name}": tensor for row, state in enumerate(states) for name, tensor in state.items()}
    header = {**provenance, INDICES: indices, LAYERS: len(states), FORMAT: 1}
    write_tensors(path, tensors, {HEADER: json.dumps(header, sort_keys=True)}, parents=True)


def read(path: Path) -> tuple[States, tuple[int, ...], dict[str, str]]:
    """State dicts, layer indices and provenance of a file of :func:`write`.

    Raises:
        InvalidArgumentError: There is no such file, or one of another kind.
    """
    with _opened(path) as (file, header):
        indices = tuple(int(index) for index in header.pop(INDICES))
        states: States = [{} for _ in range(int(header.pop(LAYERS)))]
        for key in file.keys():  # noqa: SIM118  # not a mapping
            row, _, name = key.partition(".")
            states[int(row)][name] = file.get_tensor(key)
        return states, indices, {name: str(value) for name, value in header.items() if name != FORMAT}


def read_header(path: Path) -> dict[str, Any]:
    """What a file says of its gates, without reading a tensor.

    Raises:
        InvalidArgumentError: There is no such file, or one of another kind.
    """
    with _opened(path) as (_, header):
        return header


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    expected = f"expected a safetensors file of gates at {path}"
    with opened(path, InvalidArgumentError, expected, malformed=(TypeError, ValueError, LookupError)) as file:
        header = json.loads((file.metadata() or {}).get(HEADER, "null"))
        mark = header.get(FORMAT) if isinstance(header, dict) else None
        check_format(mark, 1, file, InvalidArgumentError, f"expected gates of format 1 in {path}", n_named=5)
        yield file, header
