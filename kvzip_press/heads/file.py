"""Head scores on disk: this package's safetensors files, and KVzip's own ``.pt`` files. Reading either runs no code."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path

import torch

from kvzip_press import torch_file
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
from kvzip_press.untrusted import JSON_BYTES

TENSOR, INDICES, FORMAT = "head_scores", "layer_indices", "kvzip_press_head_scores"
# Says that there is a checksum, lest a file whose checksum has lost its name count as an old one.
SEALED = "kvzip_press_sealed"
_OURS = (FORMAT, INDICES, SEALED)
_MAX_SIZE = 100_000  # layers, or heads of one
_PT_BYTES = 64 * 2**20


def write(path: Path, values: torch.Tensor, metadata: Mapping[str, str]) -> None:
    """Writes ``values`` and their metadata, whole or not at all; the folder is created if it does not exist.

    The SHA-256 of both is stored beside them.

    Raises:
        CacheFileError: The file cannot be written.
        InvalidArgumentError: :func:`read` would refuse it.
    """
    tensors, texts = {TENSOR: values.cpu()}, {**metadata, FORMAT: "1", SEALED: DIGEST}
    _check(values, texts, f"head scores for {path}")
    write_tensors(path, tensors, {**texts, DIGEST: digest_of_contents(tensors, texts)}, parents=True)


def read(path: Path) -> tuple[torch.Tensor, dict[str, str], tuple[int, ...]]:
    """Reads values, provenance and layer indices from a file that :func:`write` wrote.

    Files of the first versions have no checksum: they are read, and a note is logged.

    Raises:
        InvalidArgumentError: The file does not exist, is of another kind, or was changed or damaged.
    """
    expected = f"expected a safetensors file of head scores at {path}"
    with opened(path, InvalidArgumentError, expected) as file:
        texts = dict(file.metadata() or {})
        mark = texts.get(FORMAT) if list(file.keys()) == [TENSOR] else None
        check_format(mark, "1", file, InvalidArgumentError, f"expected head scores of format 1 in {path}")
        values = tensor_in(file, TENSOR, FLOATS, InvalidArgumentError, expected)
    sealed = DIGEST in texts or SEALED in texts
    digest = texts.pop(DIGEST, "") if sealed else None
    check_contents({TENSOR: values}, texts, digest, InvalidArgumentError, str(path))
    indices = _check(values, texts, str(path))
    return values, {name: text for name, text in texts.items() if name not in _OURS}, indices


def _check(values: torch.Tensor, texts: Mapping[str, str], where: str) -> tuple[int, ...]:
    """Returns the layer indices, after checking sizes and the metadata that are JSON; what is saved can be loaded."""
    if max(values.shape, default=0) > _MAX_SIZE or any(len(text) > JSON_BYTES for text in texts.values()):
        raise InvalidArgumentError(
            f"expected at most {_MAX_SIZE} layers and heads, and texts of {JSON_BYTES} characters, in {where}, got "
            f"values {tuple(values.shape)}"
        )
    indices = json_of(texts.get(INDICES, "[]"), InvalidArgumentError, f"expected JSON as {INDICES} in {where}")
    if not isinstance(indices, list) or not all(type(index) is int and 0 <= index < _MAX_SIZE for index in indices):
        raise InvalidArgumentError(
            f"expected {INDICES} of 0 to {_MAX_SIZE - 1} in {where}, got {reprlib.repr(indices)}"
        )
    for name in ("k_proj_norms", "texts"):
        expected = f"expected a JSON list as {name} in {where}"
        if name in texts and not isinstance(json_of(texts[name], InvalidArgumentError, expected), list):
            raise InvalidArgumentError(f"{expected}, got {texts[name][:80]!r}")
    return tuple(indices)


def read_pt(path: Path) -> torch.Tensor:
    """Reads the one tensor of a ``.pt`` file, as fp32 ``[layers, heads]``.

    Raises:
        InvalidArgumentError: The file does not exist, is damaged, or holds something other than one such tensor.
    """
    wanted = f"expected one floating-point tensor [layers, heads] in {path}, as KVzip saves it"
    try:
        loaded = torch_file.read(path, max_bytes=_PT_BYTES)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{wanted}, got {type(error).__name__}: {error}") from error
    if not isinstance(loaded, torch.Tensor):
        raise InvalidArgumentError(f"{wanted}, got a {type(loaded).__name__}")
    values, shape = loaded, tuple(loaded.shape)
    while values.dim() > 2 and 1 in values.shape:
        values = values.squeeze(list(values.shape).index(1))
    if values.dim() != 2 or not values.is_floating_point() or not 0 < max(values.shape) <= _MAX_SIZE:
        raise InvalidArgumentError(f"{wanted}, got {shape} of {loaded.dtype}")
    if bool((values == values.flatten()[0]).all()) and values.numel() > 1:
        raise InvalidArgumentError(f"{wanted}, got {float(values.flatten()[0])} for every head, which orders none")
    return values.float()
