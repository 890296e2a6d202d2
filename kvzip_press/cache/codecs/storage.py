"""How the keys and values of kept pairs are stored in memory, and attention to them as they are stored.

A codec is one subclass. Everything else about a pair (its position and score), and all code that moves pairs, is the
same for every storage, in :mod:`kvzip_press.cache.packed_pairs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvzip_press.kernels.numerics import accumulation_dtype

POSITIONS = "positions"  # the column that every storage finds beside its own
Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Storage(ABC):
    """A kind of storage, for the shapes of one layer.

    Columns are tensors whose entry i belongs to pair i. A column is ``[total_kept, ...]`` for packed pairs and
    ``[batch, num_heads, n, ...]`` for a dense span. Tables are tensors whose entry s belongs to segment s, all pairs of
    a (row, head): ``[rows * num_heads, ...]``. They are made when the first pairs of a segment are packed, and stay.

    Args:
        head_dim: Width of a key.
        v_head_dim: Width of a value.
        dtype: Dtype of the model's keys and values.
    """

    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    #: Whether keys and values come back as they were; if not, they must be finite.
    is_exact: ClassVar[bool] = False

    #: Whether the columns of a pair depend on that pair alone, not on what else is kept when it is packed.
    encodes_alone: ClassVar[bool] = False

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> Storage:
        """Returns the storage for keys and values of these shapes, ``[..., head_dim]`` and ``[..., v_head_dim]``.

        Raises:
            InvalidArgumentError: It cannot hold them.
        """
        cls.check_widths(keys.shape[-1], values.shape[-1])
        return cls(keys.shape[-1], values.shape[-1], keys.dtype)

    @classmethod  # noqa: B027  # most storages hold any
    def check_widths(cls, head_dim: int, v_head_dim: int) -> None:
        """Raises InvalidArgumentError if keys and values of these widths cannot be stored."""

    @property
    def dense_pair_bytes(self) -> int:
        """Bytes of one key and one value in the model's dtype."""
        return (self.head_dim + self.v_head_dim) * self.dtype.itemsize

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype in which keys and values are computed with: fp32, or fp64 for a model in fp64."""
        return accumulation_dtype(self.dtype)

    @abstractmethod
    def column_shapes(self) -> Shapes:
        """Returns the dtype and the shape for one pair of each column, by name, in storage order."""

    def table_shapes(self) -> Shapes:
        """Returns the dtype and the shape for one segment of each table, by name; most storages have none."""
        return {}

    def tables(
        self, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the tables for segments that begin with the kept pairs of a dense span.

        Args:
            keys: ``[batch, num_heads, n, head_dim]``.
            values: ``[batch, num_heads, n, v_head_dim]``.
            keep: ``[batch, num_heads, n]``, bool; what is not kept may be anything.
            positions: ``[batch, n]``, int32.
        """
        return {}

    def tables_after_eviction(
        self, tables: Mapping[str, torch.Tensor], positions: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Returns the tables of segments that have lost pairs: the same ones, for most storages.

        Args:
            tables: Those before.
            positions: ``[total_kept]``, of the pairs that are left.
            cu_seqlens: Where the segment of each (row, head) begins.
        """
        return tables

    @abstractmethod
    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, tables: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns the columns of a dense span.

        Args:
            keys: ``[batch, num_heads, n, head_dim]``, after RoPE.
            values: ``[batch, num_heads, n, v_head_dim]``.
            tables: Those of the segments that the span belongs to, ``[batch * num_heads, ...]``.
        """

    @abstractmethod
    def decode(
        self, columns: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys ``[..., n, head_dim]`` and values ``[..., n, v_head_dim]`` in the model's dtype.

        Args:
            columns: Those of the storage and "positions", ``[..., n, ...]``.
            tables: The table entries of the segments ``[...]`` that the pairs belong to.
        """

    @abstractmethod
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
        """Computes attention to packed pairs, as they are stored, and to a dense tail after them.

        It is exact for what :meth:`decode` returns, and holds no decoded copy of all pairs.

        Args:
            query: ``[batch, num_attention_heads, query_length, head_dim]``.
            columns: The packed pairs, "positions" among their columns.
            tables: The tables of their segments.
            cu_seqlens: Where the segment of each (row, head) begins.
            tail_keys: ``[batch, num_heads, length, head_dim]``, in the model's dtype; None for no tail.
            tail_values: ``[batch, num_heads, length, v_head_dim]``.
            options: Those of :func:`kvzip_press.kernels.ragged_attention.ragged_attention`, which also describes the
                result.
        """
