"""The state of a training: a safetensors file with the parameters and what the optimiser remembers."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from kvzip_press.errors import KVzipPressError, RunDirectoryError
from kvzip_press.files import digest_of, digest_of_tensor, opened, to_json, write_tensors

Tensors = dict[str, torch.Tensor]

_KINDS = ("parameter.", "state.")
logger = logging.getLogger(__name__)


def write_state(path: Path, training: str, parameters: Tensors, momentum: Tensors) -> None:
    """Writes a state with its SHA-256, whole or not at all.

    Raises:
        CacheFileError: The file cannot be written.
    """
    tensors = {
        f"{kind}{name}": tensor.detach().cpu().contiguous()
        for kind, stacked in zip(_KINDS, (parameters, momentum), strict=True)
        for name, tensor in stacked.items()
    }
    write_tensors(path, tensors, {"contents": _contents(training, tensors)})


def read_state(path: Path, training: str) -> tuple[Tensors, Tensors] | None:
    """Returns parameters and momentum, or None, with a note, if the file is damaged or of another training."""
    expected = f"expected the state of a training at {path}"
    try:
        if not path.is_file():  # opening a pipe would wait for someone to write into it
            raise RunDirectoryError(f"{expected}, got something that is no file")
        with opened(path, RunDirectoryError, expected) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            if (file.metadata() or {}).get("contents") != _contents(training, tensors):
                raise RunDirectoryError(f"{expected}, got one that was changed, or of another training")
    except KVzipPressError as error:
        logger.warning("%s: trained again from the state before it", error)
        return None
    parameters, momentum = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in _KINDS
    )
    return parameters, momentum


def _contents(training: str, tensors: Tensors) -> str:
    return digest_of(to_json([training, {name: digest_of_tensor(tensor) for name, tensor in tensors.items()}]).encode())
