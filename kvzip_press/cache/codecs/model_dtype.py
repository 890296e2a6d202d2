"""The storage "model": keys and values as the model made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.storage import Attended, Shapes, Storage
from kvzip_press.kernels.ragged_attention import ragged_attention


@dataclass(frozen=True)
class ModelDtype(Storage):
    """Stores keys and values as the model made them."""

    is_exact: ClassVar[bool] = True
    encodes_alone: ClassVar[bool] = True

    def column_shapes(self) -> Shapes:
        """Returns the shapes of a key and a value."""
        return {"keys": (self.dtype, (self.head_dim,)), "values": (self.dtype, (self.v_head_dim,))}

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tables: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns keys and values as they are."""
        return {"keys": keys, "values": values}

    def decode(
        self, columns: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values as they are."""
        return columns["keys"], columns["values"]

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
        """Computes ragged attention over the tensors as they are."""
        return ragged_attention(
            query, columns["keys"], columns["values"], cu_seqlens, tail_keys, tail_values, **options
        )
