"""Files that a command is told to write: what would fail after long work, or destroy a text, is said at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import check_writable


def check_file_to_write(out: Path, read: Iterable[str | Path] = (), *, named: str = "--text") -> None:
    """Checks where a file is to be written, before any work; folders around it are made later.

    Args:
        out: The file; it may exist, and is replaced then.
        read: Files that the command reads; what is no file is left out.
        named: The option that names these.

    Raises:
        InvalidArgumentError: It is one of the files that are read, or cannot be made where it is.
    """
    check_writable(out, "--out", parents=True)
    if out.exists() and any(Path(one).exists() and out.samefile(one) for one in read):
        raise InvalidArgumentError(f"expected --out to be another file than {named}, got {out} for both")
