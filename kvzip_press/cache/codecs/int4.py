"""The storage "int4": keys and values in 4 bits, keys centred and rotated so that few bits are enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.row_storage import RowStorage, by_batch_row
from kvzip_press.cache.codecs.storage import Attended, Shapes
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.row_codec import decode_rows, rotate

CENTRES = "key_centres"


@dataclass(frozen=True)
class Int4(RowStorage):
    """Stores a key and a value in 4 bits, each with a scale and a zero: a quarter of the bytes of bf16.

    Keys are what 4 bits are too few for: some of their channels are far larger than all others, and almost the same
    number for every token. So each head's mean key is subtracted (SmoothK of SageAttention, arXiv 2410.02367, does so
    before a product), and a Hadamard matrix spreads what is left over all channels (QuaRot, arXiv 2404.00456). Queries
    are rotated instead of keys being rotated back, and the mean, kept for each head, comes back in the logits.
    """

    encodes_alone: ClassVar[bool] = False  # a mean key is that of the kept ones
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

    def table_shapes(self) -> Shapes:
        """Returns the shape of a head's mean key, rotated."""
        return {CENTRES: (self.dtype, (self.head_dim,))}

    def tables(
        self, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the mean of the kept keys of each (row, head), rotated."""
        kept = keep.unsqueeze(-1)
        total = torch.where(kept, keys, 0).sum(dim=2, dtype=self.exact_dtype)
        mean = total / kept.sum(dim=2).clamp(min=1)
        return {CENTRES: rotate(mean).to(self.dtype).flatten(0, 1)}

    def before_encoding(self, keys: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns keys rotated and centred."""
        return rotate(keys.to(self.exact_dtype)) - tables[CENTRES].view(*keys.shape[:2], 1, -1)

    def decode(
        self, columns: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys, rotated back, and values."""
        key, value = self.codes(columns)
        keys = rotate(decode_rows(key, self.exact_dtype) + tables[CENTRES].unsqueeze(-2))
        return keys.to(self.dtype), decode_rows(value, self.dtype)

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
        """Computes attention of rotated queries to keys that stay rotated, and of the queries to the tail.

        A head's mean key adds the same to all logits of a query: its product with the query.
        """
        rotated = rotate(query.to(self.exact_dtype))
        centres = by_batch_row(tables[CENTRES], query, tail_keys, options.get("row_index")).to(self.exact_dtype)
        grouped = rotated.unflatten(1, (centres.shape[1], -1))
        bias = (grouped @ centres[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
        return super().attend(
            query,
            columns,
            tables,
            cu_seqlens,
            tail_keys,
            tail_values,
            context_query=rotated.to(query.dtype),
            context_bias=bias,
            **options,
        )
