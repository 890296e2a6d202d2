"""The storage "int8": keys and values in 8 bits, with a scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.cache.codecs.row_storage import RowStorage


@dataclass(frozen=True)
class Int8(RowStorage):
    """Stores a key and a value as int8, each with its own scale: half the bytes of bf16, and an error of 1/254.

    That is of the largest number of a row, at most. On no model that was tried could answers be told from those of the
    model's own dtype.
    """

    key_format: ClassVar[str] = "int8"
    value_format: ClassVar[str] = "int8"
