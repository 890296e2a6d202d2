"""This package's files: written whole or not at all; whatever is wrong with one raises an error of this package."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvzip_press.errors import CacheFileError, KVzipPressError

DIGEST = "sha256"  # metadata key of a text's seal, which is stored beside the text


@contextmanager
def replacing(path: Path, *, parents: bool = False) -> Iterator[Path]:
    """Yields a temporary file beside ``path`` that replaces it when all is written; after an error the old file stays.

    With ``parents``, its folder is created if it does not exist.

    Raises:
        CacheFileError: The file cannot be written. The message names the path and the cause.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # minus the umask
        mode = temporary.stat().st_mode & 0o777
        try:
            yield temporary
            temporary.chmod(mode)  # safetensors puts a file of its own there, which only the owner may read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # makes the new name survive a power cut, if folders can be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        raise CacheFileError(f"expected to write {path}, got {type(error).__name__}: {error}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str], *, seal: str = "", parents: bool = False
) -> None:
    """Writes tensors of any device, and texts that describe them, as a safetensors file: whole or not at all.

    ``seal`` names the text whose SHA-256 is stored, too, for :func:`check_seal`; ``parents`` is that of
    :func:`replacing`.

    Raises:
        CacheFileError: The file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = {DIGEST: digest_of(texts[seal].encode())} if seal else {}
    with replacing(path, parents=parents) as temporary:
        save_file(plain, temporary, metadata={**texts, **digest})


@contextmanager
def opened(
    path: Path, error: type[KVzipPressError], expected: str, *, malformed: tuple[type[Exception], ...] = ()
) -> Iterator[Any]:
    """Opens a safetensors file, mapped into memory. Whatever is wrong with it inside is raised as ``error``.

    The message is ``expected`` and the cause; an error of this package says enough, and is raised as it is.
    ``malformed`` are further exceptions that malformed contents cause inside the context. A caller that checks the
    contents itself gives none, so that its own mistakes are not blamed on the file.
    """
    causes: tuple[type[Exception], ...] = (OSError, SafetensorError, UnicodeError, *malformed)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except KVzipPressError:  # some are a ValueError or an OSError too
        raise
    except causes as cause:
        raise error(f"{expected}, got {type(cause).__name__}: {cause}") from cause


def check_format(
    got: object, known: object, file: Any, error: type[KVzipPressError], expected: str, *, n_named: int | None = None
) -> None:
    """Raises ``error`` unless a format mark is the known one; the message names the file's first ``n_named`` tensors.

    None names all of them.
    """
    if got != known:
        raise error(f"{expected}, got the tensors {sorted(file.keys())[:n_named]}")


def check_seal(texts: Mapping[str, str], name: str, error: type[KVzipPressError]) -> None:
    """Raises ``error`` if the SHA-256 stored beside the text ``name`` is missing or is not that of the text."""
    if digest_of(texts[name].encode()) != texts.get(DIGEST):
        raise error("expected metadata with the SHA-256 beside them, got another: the file was changed")


def to_json(value: Any) -> str:
    """Returns JSON in which equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(data: Any) -> str:
    """Returns the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """Returns the SHA-256 of a CPU tensor's bytes, in hexadecimal."""
    return digest_of(tensor.reshape(-1).view(torch.uint8).numpy())
