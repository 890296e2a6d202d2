"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kvzip_press.errors import CacheFileError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when all was written; on an error the old file stays.

    Raises:
        CacheFileError: The file cannot be written. Names the path and the cause.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
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
