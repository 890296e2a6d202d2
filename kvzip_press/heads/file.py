"""Head scores on disk: this package's safetensors files, and KVzip's own ``.pt`` files. Reading either runs no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import check_format, opened, write_tensors

TENSOR, INDICES, FORMAT = "head_scores", "layer_indices", "kvzip_press_head_scores"


def write(path: Path, values: torch.Tensor, metadata: Mapping[str, str]) -> None:
    """Writes ``values`` and their metadata, whole or not at all; the folder is created if it does not exist.

    Raises:
        CacheFileError: The file cannot be written.
    """
    write_tensors(path, {TENSOR: values}, {**metadata, FORMAT: "1"}, parents=True)


def read(path: Path) -> tuple[torch.Tensor, dict[str, str], tuple[int, ...]]:
    """Reads values, provenance and layer indices from a file that :func:`write` wrote.

    Raises:
        InvalidArgumentError: The file does not exist or is of another kind.
    """
    expected = f"expected a safetensors file of head scores at {path}"
    with opened(path, InvalidArgumentError, expected, malformed=(TypeError, ValueError)) as file:
        metadata = dict(file.metadata() or {})
        mark = metadata.pop(FORMAT, None) if TENSOR in file.keys() else None  # noqa: SIM118  # not a mapping
        check_format(mark, "1", file, InvalidArgumentError, f"expected head scores of format 1 in {path}")
        indices = tuple(int(index) for index in json.loads(metadata.pop(INDICES, "[]")))
        return file.get_tensor(TENSOR), metadata, indices


def read_pt(path: Path) -> torch.Tensor:
    """Reads the one tensor of a ``.pt`` file, as fp32 ``[layers, heads]``.

    Raises:
        InvalidArgumentError: The file does not exist, or holds something other than one such tensor.
    """
    wanted = f"expected one floating-point tensor [layers, heads] in {path}, as KVzip saves it"
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged or hostile file can raise anything; none of it was run
        cause = str(error).strip().partition("\n")[0]
        raise InvalidArgumentError(f"{wanted}, got {type(error).__name__}: {cause}") from error
    if not isinstance(loaded, torch.Tensor):
        raise InvalidArgumentError(f"{wanted}, got a {type(loaded).__name__}")
    values, shape = loaded, tuple(loaded.shape)
    while values.dim() > 2 and 1 in values.shape:
        values = values.squeeze(list(values.shape).index(1))
    if values.dim() != 2 or not values.is_floating_point() or values.layout != torch.strided:
        raise InvalidArgumentError(f"{wanted}, got {shape} of {loaded.dtype}")
    return values.float()
