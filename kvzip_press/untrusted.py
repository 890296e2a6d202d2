"""Reads text and JSON that someone else may have written: bounded before memory is taken, and strict.

Formats that are Python objects, archives or programs are not read at all. What is wrong raises ``ValueError`` with a
sentence that says so; whoever knows which file it is makes it the error of that file.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MEGABYTE = 2**20
TEXT_BYTES = 256 * MEGABYTE  # the longest text file that is read whole, unless its reader names another bound
JSON_BYTES = 16 * MEGABYTE
MAX_DEPTH = 100  # of nested lists and mappings
MAX_DIGITS = 400  # of one number: float64 needs 309 before its point
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|[\[{]|[\]}]', re.DOTALL)  # a string may end with the text


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file to read it in parts; whoever reads it bounds each part.

    Raises:
        ValueError: It is no regular file (a pipe, a device).
        OSError: It does not exist, is a folder, or cannot be read.
    """
    # Not blocking: opening a pipe would wait for someone to write into it.
    descriptor = os.open(Path(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(descriptor, "rb")  # raises for a folder
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise ValueError("expected a regular file, got a pipe or a device")
    return file


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int = TEXT_BYTES) -> bytes:
    """Returns the bytes of a regular file.

    Raises:
        ValueError: It is no regular file (a folder, a pipe, a device), or longer than ``max_bytes``.
        OSError: It does not exist or cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
        size = os.fstat(file.fileno()).st_size
    if len(data) > max_bytes:
        raise ValueError(f"expected a file of at most {max_bytes} bytes, got {max(size, len(data))}")
    return data


def read_text(path: str | os.PathLike[str], *, max_bytes: int = TEXT_BYTES) -> str:
    """Returns the text of a regular file in UTF-8; a byte-order mark at its beginning is left out.

    Raises:
        ValueError: It is no regular file, longer than ``max_bytes``, or not UTF-8.
        OSError: It does not exist or cannot be read.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, got the byte 0x{data[error.start]:02x} at {error.start}") from error


def parse_json(text: str | bytes, *, max_bytes: int = JSON_BYTES) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: Not JSON in UTF-8; longer than ``max_bytes``; nested more than `MAX_DEPTH` deep; a name twice in one
            object; NaN, an infinity, or a number of more than `MAX_DIGITS` characters or beyond float64.
    """
    if len(text) > max_bytes:
        raise ValueError(f"expected at most {max_bytes} bytes of JSON, got {len(text)}")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    _check_depth(text)
    return json.loads(
        text, parse_int=_integer, parse_float=_finite, parse_constant=_constant, object_pairs_hook=_object
    )


def _check_depth(text: str) -> None:
    """Raises before the parser recurses: how deep it may go depends on who called it."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"expected JSON nested at most {MAX_DEPTH} deep, got more")


def _integer(digits: str) -> int:
    _check_digits(digits)
    return int(digits)


def _finite(digits: str) -> float:
    _check_digits(digits)
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"expected numbers within float64, got {digits[:40]}")
    return number


def _check_digits(digits: str) -> None:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"expected numbers of at most {MAX_DIGITS} characters, got one of {len(digits)}")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"expected each name once in a JSON object, got {twice[:80]!r} twice")
    return found
