"""How the keys and values of kept pairs are stored in memory, and attention to them as they are stored.

A codec is one subclass. Everything else about a pair (its position and score), and all code that moves pairs, is the
same for every storage, in :mod:`kvzip_press.cache.packed_pairs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.kernels.ragged_attention import ragged_attention

Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Storage(ABC):
    """A kind of storage, for the shapes of one layer.

    Columns are tensors whose entry i belongs to pair i. A column is ``[total_kept, ...]`` for packed pairs and
    ``[batch, num_heads, n, ...]`` for a dense span.

    Args:
        head_dim: Width of a key.
        v_head_dim: Width of a value.
        dtype: Dtype of the model's keys and values.
    """

    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> Storage:
        """Returns the storage for keys and values of these shapes, ``[..., head_dim]`` and ``[..., v_head_dim]``."""
        return cls(keys.shape[-1], values.shape[-1], keys.dtype)

    @property
    def dense_pair_bytes(self) -> int:
        """Bytes of one key and one value in the model's dtype."""
        return (self.head_dim + self.v_head_dim) * self.dtype.itemsize

    @abstractmethod
    def column_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns the dtype and the shape for one pair of each column, by name, in storage order."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the columns of a dense span.

        Args:
            keys: ``[batch, num_heads, n, head_dim]``, after RoPE.
            values: ``[batch, num_heads, n, v_head_dim]``.
        """

    @abstractmethod
    def decode(self, columns: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys ``[..., head_dim]`` and values ``[..., v_head_dim]`` in the model's dtype, from columns."""

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
        cu_seqlens: torch.Tensor,
        tail_keys: torch.Tensor | None,
        tail_values: torch.Tensor | None,
        **options: Any,
    ) -> Attended:
        """Computes exact attention to packed pairs and a dense tail after them.

        Args:
            query: ``[batch, num_attention_heads, query_length, head_dim]``.
            columns: The packed pairs.
            cu_seqlens: Where the segment of each (row, head) begins.
            tail_keys: ``[batch, num_heads, length, head_dim]``, in the model's dtype; None for no tail.
            tail_values: ``[batch, num_heads, length, v_head_dim]``.
            options: Those of :func:`kvzip_press.kernels.ragged_attention.ragged_attention`, which also describes the
                result.
        """


@dataclass(frozen=True)
class ModelDtype(Storage):
    """Stores keys and values as the model made them."""

    def column_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns the shapes of a key and a value."""
        return {"keys": (self.dtype, (self.head_dim,)), "values": (self.dtype, (self.v_head_dim,))}

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns keys and values as they are."""
        return {"keys": keys, "values": values}

    def decode(self, columns: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values as they are."""
        return columns["keys"], columns["values"]

    def attend(
        self,
        query: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
        cu_seqlens: torch.Tensor,
        tail_keys: torch.Tensor | None,
        tail_values: torch.Tensor | None,
        **options: Any,
    ) -> Attended:
        """Computes ragged attention over the tensors as they are."""
        return ragged_attention(
            query, columns["keys"], columns["values"], cu_seqlens, tail_keys, tail_values, **options
        )
