"""Gates on disk: one safetensors file, with what is known of them in its metadata. Reading it runs no code.

The metadata is one JSON text under one name: safetensors writes several names in any order, and the same gates are to
give the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import replacing

HEADER, FORMAT, INDICES, LAYERS = "kvzip_press_gates", "format", "layer_indices", "layers"

States = list[dict[str, torch.Tensor]]


def write(
    path: Path, states: Sequence[Mapping[str, torch.Tensor]], indices: tuple[int, ...], provenance: Mapping[str, str]
) -> None:
    """Writes the state dict of each gate beside the file's name, then renames.

    Raises:
        CacheFileError: The file cannot be written.
    """
    tensors = {
        f"{row}.{name}": tensor.detach().cpu().contiguous()
        for row, state in enumerate(states)
        for name, tensor in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {**provenance, INDICES: indices, LAYERS: len(states), FORMAT: 1}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER: json.dumps(header, sort_keys=True)})


def read(path: Path) -> tuple[States, tuple[int, ...], dict[str, str]]:
    """State dicts, layer indices and provenance of a file of :func:`write`.

    Raises:
        InvalidArgumentError: There is no such file, or one of another kind.
    """
    try:
        header = read_header(path)
        indices = tuple(int(index) for index in header.pop(INDICES))
        states: States = [{} for _ in range(int(header.pop(LAYERS)))]
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                row, _, name = key.partition(".")
                states[int(row)][name] = file.get_tensor(key)
        return states, indices, {name: str(value) for name, value in header.items() if name != FORMAT}
    except (OSError, SafetensorError, TypeError, ValueError, LookupError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            f"expected a safetensors file of gates at {path}, got {type(error).__name__}: {error}"
        ) from error


def read_header(path: Path) -> dict[str, Any]:
    """What a file says of its gates, without reading a tensor.

    Raises:
        InvalidArgumentError: It is a safetensors file of something else.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        header = json.loads((file.metadata() or {}).get(HEADER, "null"))
        if not isinstance(header, dict) or header.get(FORMAT) != 1:
            raise InvalidArgumentError(
                f"expected gates of format 1 in {path}, got the tensors {sorted(file.keys())[:5]}"
            )
    return header
