"""Files of ours: written whole or not at all, and read with an error of ours for whatever is wrong with one."""

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

DIGEST = "sha256"  # the name under which the seal of a text stands beside it


@contextmanager
def replacing(path: Path, *, parents: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when all was written; on an error the old file stays.

    With ``parents`` its folder is made where it is missing.

    Raises:
        CacheFileError: The file cannot be written. Names the path and the cause.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # less what the umask takes
        mode = temporary.stat().st_mode & 0o777
        try:
            yield temporary
            temporary.chmod(mode)  # safetensors puts a file of its own there, which only the owner may read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # makes the new name last through a power cut, where folders can be opened
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
    """Writes tensors of any device, and texts that say what they are, as a safetensors file: whole or not at all.

    ``seal`` names the text whose SHA-256 is written too, for :func:`check_seal`; ``parents`` is :func:`replacing`'s.

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
    """A safetensors file, mapped into memory. Whatever is wrong with it in here is raised as ``error``.

    The message is ``expected`` and the cause; an error of ours says enough, and stays as it is. ``malformed`` is what
    else contents raise that are not as written. Who checks them names none: a caller's mistakes are not the file's.
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
    """Raises ``error``, with the names of (the first ``n_named``) tensors, where a format mark is not the known one."""
    if got != known:
        raise error(f"{expected}, got the tensors {sorted(file.keys())[:n_named]}")


def check_seal(texts: Mapping[str, str], name: str, error: type[KVzipPressError]) -> None:
    """Raises ``error`` where the SHA-256 beside the text ``name`` is missing or another's."""
    if digest_of(texts[name].encode()) != texts.get(DIGEST):
        raise error("expected metadata with the SHA-256 beside them, got another: the file was changed")


def to_json(value: Any) -> str:
    """JSON of which equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(data: Any) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return digest_of(tensor.reshape(-1).view(torch.uint8).numpy())
