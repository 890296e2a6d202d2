"""What storages have in common that encode each key and each value by itself, with a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.storage import Attended, Shapes, Storage
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.kernels.row_codec import CODECS, Codes, decode_rows, encode_rows

BLOCK = 8192  # tokens that are encoded at a time, in fp32
STORED = {torch.float8_e4m3fn: torch.uint8}  # few operations know 8-bit floats; their bits are moved as bytes


@dataclass(frozen=True)
class RowStorage(Storage):
    """Encodes rows in the formats of :mod:`kvzip_press.kernels.row_codec`.

    Pairs need nothing of each other, so those that are evicted later leave the others' codes as they are.
    """

    encodes_alone: ClassVar[bool] = True
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

    def column_shapes(self) -> Shapes:
        """Returns the shapes of codes and scales."""
        return {
            **_shapes("key", self.key_format, self.head_dim),
            **_shapes("value", self.value_format, self.v_head_dim),
        }

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tables: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns codes and scales of keys and values, made of a block of tokens at a time."""
        blocks = zip(keys.split(BLOCK, dim=2), values.split(BLOCK, dim=2), strict=True)
        parts = [self._encoded(*block, tables) for block in blocks]
        return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}

    def _encoded(
        self, keys: torch.Tensor, values: torch.Tensor, tables: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        key = encode_rows(self.before_encoding(keys, tables), self.key_format)
        value = encode_rows(values, self.value_format)
        return {
            "key_codes": _as_stored(key.codes),
            "key_scales": key.scales,
            "value_codes": _as_stored(value.codes),
            "value_scales": value.scales,
        }

    def before_encoding(self, keys: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns keys ``[batch, num_heads, n, head_dim]`` as they are encoded: as they are, in most storages."""
        return keys

    def decode(
        self, columns: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values, each number within half a step of what it was."""
        key, value = self.codes(columns)
        return decode_rows(key, self.dtype), decode_rows(value, self.dtype)

    def codes(self, columns: Mapping[str, torch.Tensor]) -> tuple[Codes, Codes]:
        """Returns the columns as codes of keys and of values."""
        key, value = (
            Codes(columns[f"{name}_codes"].view(CODECS[form].dtype), columns[f"{name}_scales"], form)
            for name, form in (("key", self.key_format), ("value", self.value_format))
        )
        return key, value

    def attend(
        self,
        query: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
        tables: Mapping[str, torch.Tensor],
        cu_seqlens: torch.Tensor,
        tail_keys: torch.Tensor | None,
        tail_values: torch.Tensor | None,
        **options: Any,
    ) -> Attended:
        """Computes ragged attention over the codes."""
        return ragged_attention(query, *self.codes(columns), cu_seqlens, tail_keys, tail_values, **options)


def by_batch_row(
    of_segments: torch.Tensor,
    query: torch.Tensor,
    tail_keys: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> torch.Tensor:
    """Returns what each segment has, ``[segments, ...]``, as what each batch row reads, ``[batch, num_heads, ...]``.

    The other arguments are those of :meth:`Storage.attend`.
    """
    heads = len(of_segments) // query.shape[0] if tail_keys is None else tail_keys.shape[1]
    rows = of_segments.unflatten(0, (-1, heads))
    return rows if row_index is None else rows[row_index]


def _shapes(name: str, form: str, width: int) -> Shapes:
    codes = CODECS[form]
    stored = STORED.get(codes.dtype, codes.dtype)
    return {
        f"{name}_codes": (stored, (width // codes.numbers_a_byte,)),
        f"{name}_scales": (torch.bfloat16, (2,) if codes.has_zero else ()),
    }


def _as_stored(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(STORED.get(codes.dtype, codes.dtype))
