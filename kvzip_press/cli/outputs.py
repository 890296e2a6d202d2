"""Files that a command is told to write: what would fail after long work, or destroy a text, is said at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from kvzip_press.errors import InvalidArgumentError


def check_file_to_write(out: Path, read: Iterable[str | Path] = (), *, named: str = "--text") -> None:
    """Checks where a file is to be written, before any work.

    Args:
        out: The file; it may exist, and is replaced then.
        read: Files that the command reads; what is no file is left out.
        named: The option that names these.

    Raises:
        InvalidArgumentError: It is a folder, or one of the files that are read, or cannot be made where it is.
    """
    if out.is_dir():
        raise InvalidArgumentError(f"expected --out to be a file to write, got the folder {out}")
    if out.exists() and any(Path(one).exists() and out.samefile(one) for one in read):
        raise InvalidArgumentError(f"expected --out to be another file than {named}, got {out} for both")
    check_place_to_write(out)


def check_place_to_write(out: Path) -> None:
    """Raises InvalidArgumentError unless the nearest folder above a file or folder that exists can be written to."""
    place = next(one for one in out.absolute().parents if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = "no folder" if not place.is_dir() else "a folder that cannot be written to"
        raise InvalidArgumentError(f"expected a place to write for --out {out}, got {place}, which is {found}")
