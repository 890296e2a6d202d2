"""What storages have in common that encode each key and each value by itself, with a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.held import Encoded, Held, NewPairs
from kvzip_press.cache.codecs.storage import Layout, Shapes, Storage
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.ragged_attention import Part
from kvzip_press.kernels.row_codec import CODECS, Codes, decode_rows, encode_rows

BLOCK = 8192  # tokens that are encoded at a time, in fp32
STORED = {torch.float8_e4m3fn: torch.uint8}  # few operations know 8-bit floats; their bits are moved as bytes


@dataclass(frozen=True)
class RowStorage(Storage):
    """Encodes rows in the formats of :mod:`kvzip_press.kernels.row_codec`.

    Pairs need nothing of each other, so those that are evicted later leave the others' codes as they are.
    """

    key_format: ClassVar[str]
    value_format: ClassVar[str]

    @classmethod
    def check_widths(cls, head_dim: int, v_head_dim: int) -> None:
        """Raises InvalidArgumentError if keys or values do not fill whole bytes."""
        for width, name in ((head_dim, cls.key_format), (v_head_dim, cls.value_format)):
            if width % CODECS[name].numbers_a_byte:
                raise InvalidArgumentError(
                    f"expected a head_dim that is a multiple of {CODECS[name].numbers_a_byte}, which {name} fills "
                    f"whole bytes with, got {width}: take a storage of 8 bits"
                )

    def layout(self) -> Layout:
        """Returns the shapes of codes and scales."""
        key = row_shapes("key", self.key_format, self.head_dim)
        return Layout({**key, **row_shapes("value", self.value_format, self.v_head_dim)})

    def tables(self, new: NewPairs) -> Mapping[str, torch.Tensor]:
        """Returns the tables of segments that begin with these pairs; most storages have none."""
        return {}

    def encode(self, new: NewPairs, before: Held | None = None) -> Encoded:
        """Returns codes and scales of keys and values."""
        tables = self.tables(new) if before is None else before.tables
        columns = {
            **encoded_rows("key", self.key_format, new.keys, **self.key_options(tables, new.keys.shape[0])),
            **encoded_rows("value", self.value_format, new.values),
        }
        return Encoded(columns, new.keep, tables)

    def key_options(self, tables: Mapping[str, torch.Tensor], batch_size: int) -> Mapping[str, Any]:
        """Returns what is done to keys before they are encoded, as options of ``encode_rows``; most need nothing."""
        return {}

    def decode(self, held: Held) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values, each number within half a step of what it was."""
        key, value = self.codes(held)
        return decode_rows(key, self.dtype), decode_rows(value, self.dtype)

    def codes(self, held: Held) -> tuple[Codes, Codes]:
        """Returns the columns as codes of keys and of values."""
        return codes_in(held, "key", self.key_format), codes_in(held, "value", self.value_format)

    def parts(
        self, query: torch.Tensor, held: Held, num_heads: int, row_index: torch.Tensor | None
    ) -> tuple[Part, ...]:
        """Returns the codes."""
        return (Part(*self.codes(held), held.cu_seqlens),)


def row_shapes(name: str, form: str, width: int) -> Shapes:
    """Returns the shapes of the codes and scales of keys or values that are encoded row by row."""
    codes = CODECS[form]
    return {
        f"{name}_codes": (STORED.get(codes.dtype, codes.dtype), (width // codes.numbers_a_byte,)),
        f"{name}_scales": (torch.bfloat16, (2,) if codes.has_zero else ()),
    }


def encoded_rows(name: str, form: str, rows: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Returns the columns of keys or values ``[batch, num_heads, n, width]``, made from a block of tokens at a time."""
    encoded = [encode_rows(block, form, **options) for block in rows.split(BLOCK, dim=2)]
    codes = torch.cat([part.codes.view(STORED.get(part.codes.dtype, part.codes.dtype)) for part in encoded], dim=2)
    return {f"{name}_codes": codes, f"{name}_scales": torch.cat([part.scales for part in encoded], dim=2)}


def codes_in(held: Held, name: str, form: str) -> Codes:
    """Returns the columns of keys or values as codes."""
    return Codes(held.columns[f"{name}_codes"].view(CODECS[form].dtype), held.columns[f"{name}_scales"], form)
