"""The storage "k8v4": keys in 8 bits, values in 4, the first tokens of a row exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.cache.codecs.parted import OTHERS, Parted
from kvzip_press.cache.codecs.row_storage import RowStorage
from kvzip_press.cache.codecs.storage import Storage


@dataclass(frozen=True)
class K8V4Rows(RowStorage):
    """Stores a key as int8 and a value in 4 bits."""

    key_format: ClassVar[str] = "int8"
    value_format: ClassVar[str] = "int4"


@dataclass(frozen=True)
class K8V4(Parted):
    """Stores a key as int8 and a value in 4 bits: 6 bits a number (LeanKV, arXiv 2412.03131, has the pair of widths).

    Keys need more bits than values, because what is wrong with a key is wrong in an exponent.
    """

    @classmethod
    def check_widths(cls, head_dim: int, v_head_dim: int) -> None:
        """Raises InvalidArgumentError if keys or values do not fill whole bytes."""
        K8V4Rows.check_widths(head_dim, v_head_dim)

    @property
    def others(self) -> Mapping[str, Storage]:
        """Codes."""
        return {OTHERS: K8V4Rows(self.head_dim, self.v_head_dim, self.dtype)}
