"""The storage "fp8": keys and values as 8-bit floating point, with a scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.cache.codecs.row_storage import RowStorage


@dataclass(frozen=True)
class Fp8(RowStorage):
    """Stores a key and a value as float8 (e4m3), each scaled to its range.

    As many bytes as :class:`~kvzip_press.cache.codecs.int8.Int8`, which keeps three bits more of the largest numbers of
    a row; fp8 keeps more of small ones beside large ones.
    """

    key_format: ClassVar[str] = "fp8"
    value_format: ClassVar[str] = "fp8"
