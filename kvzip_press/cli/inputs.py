"""Reads the text files that a command is given."""

from __future__ import annotations

import os
from pathlib import Path

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.untrusted import read_text


def text_of(path: Path) -> str:
    """Returns the text of a file in UTF-8.

    Raises:
        InvalidArgumentError: The file does not exist or cannot be read; it is a folder, a pipe or a device; or it holds
            something else than text, or nothing. The message names the path.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise InvalidArgumentError(f"{path}: expected a text file, got {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path}: {error}") from error
    if (place := text.find("\0")) >= 0:
        raise InvalidArgumentError(f"{path}: expected a text file, got a null byte behind {place} characters")
    if not text.strip():
        raise InvalidArgumentError(f"{path}: expected a file with text in it, got an empty one")
    return text


def regular(path: Path) -> Path:
    """Returns the path of a file that can be opened without waiting for anybody.

    Raises:
        InvalidArgumentError: There is no such file, or it is a folder, a pipe or a device. The message names the path.
    """
    if not os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises for a name that is too long
        found = "a folder" if os.path.isdir(path) else "a pipe or a device" if os.path.exists(path) else "nothing"  # noqa: PTH110, PTH112
        raise InvalidArgumentError(f"{path}: expected a file, got {found}")
    return path
