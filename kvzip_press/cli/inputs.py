"""Reads the text files that a command is given."""

from __future__ import annotations

from pathlib import Path

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.untrusted import read_text


def text_of(path: Path) -> str:
    """Returns the text of a file in UTF-8.

    Raises:
        InvalidArgumentError: The file does not exist or cannot be read; it is a folder, a pipe or a device; or it holds
            something else than text. The message names the path.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise InvalidArgumentError(f"{path}: expected a text file, got {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path}: {error}") from error
    if (place := text.find("\0")) >= 0:
        raise InvalidArgumentError(f"{path}: expected a text file, got a null byte behind {place} characters")
    return text
