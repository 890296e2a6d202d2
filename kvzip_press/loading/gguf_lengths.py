"""Compares the lengths that a GGUF file claims with what it has, before the package ``gguf`` believes them.

Its reader makes an object for each element that an array claims, whether the file goes on or not.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from pathlib import Path

from kvzip_press.errors import InvalidArgumentError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_STRING, _ARRAY = 8, 9
_MAX_ARRAY_DEPTH = 4
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 100_000  # fields, or tensors
_MAX_ELEMENTS = (
    3_000_000  # of all arrays: each becomes an object of some hundred bytes; Gemma's vocabulary has 0.8 million
)


def check_lengths(path: Path) -> None:
    """Raises InvalidArgumentError unless a file is a GGUF (version 2 or 3, little-endian) that holds what it claims.

    Takes no memory and reads each length once: about a second for a vocabulary of 256 thousand tokens.
    """
    expected = f"expected a whole GGUF file at {path}"
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidArgumentError(f"{expected}, got a pipe or a device")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(data).file()
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"{expected}, got {type(error).__name__}: {error}") from error


class _Walk:
    """A place in the file, which goes on by what stands there and not beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._n_elements = data, 0, 0

    def file(self) -> None:
        magic, version = self._skip(4), self._number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"expected version 2 or 3 of the format, got {magic!r} and {version}")
        n_tensors, n_fields = self._count(), self._count()
        if max(n_tensors, n_fields) > _MAX_ENTRIES:
            raise ValueError(f"expected at most {_MAX_ENTRIES} fields and tensors, got {n_fields} and {n_tensors}")
        for _ in range(n_fields):
            self._string()
            self._value(self._number("<I"), depth=0)
        for _ in range(n_tensors):
            self._string()
            if (n_dimensions := self._number("<I")) > _MAX_DIMENSIONS:
                raise ValueError(f"expected tensors of at most {_MAX_DIMENSIONS} dimensions, got {n_dimensions}")
            self._skip(8 * n_dimensions + 4 + 8)  # shape, type, offset

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            element, count = self._number("<I"), self._count()
            self._n_elements += count
            if self._n_elements > _MAX_ELEMENTS:
                raise ValueError(f"expected arrays of at most {_MAX_ELEMENTS} elements, got {self._n_elements}")
            if element in _SCALARS:
                self._skip(count * _SCALARS[element])
            else:
                for _ in range(count):
                    self._value(element, depth + 1)
        else:
            raise ValueError(f"expected a known type of value, got {kind}, {depth} arrays deep")

    def _string(self) -> None:
        self._skip(self._count())

    def _count(self) -> int:
        """Returns a count of things of a byte or more; there cannot be more of them than bytes."""
        count = self._number("<Q")
        if count > len(self._data) - self._at:
            raise ValueError(f"expected no more than the file has, got a length of {count} at {self._at - 8}")
        return count

    def _number(self, form: str) -> int:
        (number,) = struct.unpack(form, self._skip(struct.calcsize(form)))
        return int(number)

    def _skip(self, size: int) -> bytes:
        """Goes on by ``size`` bytes; returns them, if they are few."""
        begin, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError(f"expected {size} bytes at {begin}, got the end of the file")
        return self._data[begin : self._at] if size <= 8 else b""
