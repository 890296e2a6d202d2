"""The storage "int4": keys and values in 4 bits, keys centred and rotated so that few bits are enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.held import Held, NewPairs
from kvzip_press.cache.codecs.parted import OTHERS, Parted
from kvzip_press.cache.codecs.row_storage import RowStorage
from kvzip_press.cache.codecs.storage import Layout, Storage
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.ragged_attention import Part
from kvzip_press.kernels.row_codec import decode_rows, rotate

CENTRES = "key_centres"


@dataclass(frozen=True)
class Int4Rows(RowStorage):
    """Stores a key and a value in 4 bits, each with a scale and a zero.

    Keys are what 4 bits are too few for: some of their channels are far larger than all others, and almost the same
    number for every token. So each head's mean key is subtracted (SmoothK of SageAttention, arXiv 2410.02367, does so
    before a product), and a Hadamard matrix spreads what is left over all channels (QuaRot, arXiv 2404.00456). Queries
    are rotated instead of keys being rotated back, and the mean, kept for each head, comes back in the logits.
    """

    key_format: ClassVar[str] = "int4"
    value_format: ClassVar[str] = "int4"

    @classmethod
    def check_widths(cls, head_dim: int, v_head_dim: int) -> None:
        """Raises InvalidArgumentError if keys cannot be rotated, or values do not fill whole bytes."""
        if head_dim < 2 or head_dim & (head_dim - 1):
            raise InvalidArgumentError(
                f"expected a head_dim that is a power of two, for keys to be rotated before int4, got {head_dim}: take "
                "storage='k8v4' or 'int8'"
            )
        super().check_widths(head_dim, v_head_dim)

    def layout(self) -> Layout:
        """Returns the shapes of codes and scales, and of a head's mean key, rotated."""
        return replace(super().layout(), tables={CENTRES: (self.dtype, (self.head_dim,))})

    def tables(self, new: NewPairs) -> dict[str, torch.Tensor]:
        """Returns the mean of the kept keys of each (row, head), rotated."""
        kept = new.keep.unsqueeze(-1)
        total = torch.where(kept, new.keys, 0).sum(dim=2, dtype=self.exact_dtype)
        mean = total / kept.sum(dim=2).clamp(min=1)
        return {CENTRES: rotate(mean).to(self.dtype).flatten(0, 1)}

    def key_options(self, tables: Mapping[str, torch.Tensor], batch_size: int) -> dict[str, Any]:
        """Returns that keys are rotated and centred."""
        return {"rotated": True, "centres": tables[CENTRES].unflatten(0, (batch_size, -1))}

    def decode(self, held: Held) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys, rotated back, and values."""
        key, value = self.codes(held)
        keys = rotate(decode_rows(key, self.exact_dtype) + held.tables[CENTRES][held.segments_of_entries()])
        return keys.to(self.dtype), decode_rows(value, self.dtype)

    def parts(
        self, query: torch.Tensor, held: Held, num_heads: int, row_index: torch.Tensor | None
    ) -> tuple[Part, ...]:
        """Returns the codes, the rotated queries that meet keys which stay rotated, and what the mean key adds.

        A head's mean key adds the same to all logits of a query: its product with the query.
        """
        rotated = rotate(query.to(self.exact_dtype))
        centres = held.tables[CENTRES].unflatten(0, (-1, num_heads)).to(self.exact_dtype)
        if row_index is not None:
            centres = centres[row_index]
        grouped = rotated.unflatten(1, (num_heads, -1))
        bias = (grouped @ centres[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
        (part,) = super().parts(query, held, num_heads, row_index)
        return (replace(part, context_query=rotated.to(query.dtype), context_bias=bias),)


@dataclass(frozen=True)
class Int4(Parted):
    """Stores a key and a value in 4 bits, keys centred and rotated: a quarter of the bytes of bf16."""

    @classmethod
    def check_widths(cls, head_dim: int, v_head_dim: int) -> None:
        """Raises InvalidArgumentError if keys cannot be rotated, or values do not fill whole bytes."""
        Int4Rows.check_widths(head_dim, v_head_dim)

    @property
    def others(self) -> Mapping[str, Storage]:
        """Codes."""
        return {OTHERS: Int4Rows(self.head_dim, self.v_head_dim, self.dtype)}
