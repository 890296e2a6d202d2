"""How the keys and values of kept pairs are stored in memory, and attention to them as they are stored.

A codec is one subclass. Everything else about a pair (its position and score), and all code that moves pairs, is the
same for every storage, in :mod:`kvzip_press.cache.packed_pairs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.held import Encoded, Held, NewPairs, Staying
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.ragged_attention import Part, parted_attention, ragged_attention

Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """The tensors of a storage, or of a part of one.

    Attributes:
        columns: Dtype and shape for one entry of each column, by name, in storage order.
        tables: Dtype and shape for one segment of each table, by name.
        parts: The layout of each part, by name.
    """

    columns: Shapes
    tables: Shapes = field(default_factory=dict)
    parts: Mapping[str, Layout] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage(ABC):
    """A kind of storage, for the shapes of one layer.

    What it holds of pairs is described in :mod:`kvzip_press.cache.codecs.held`. Tables are made when the first pairs of
    a segment are packed, and stay.

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
    #: Whether attention reads listed pairs where they lie (``pair_index``); if not, these are copied first.
    reads_lists: ClassVar[bool] = False
    #: Whether it looks at the importance of pairs; what makes that needs not do so for another.
    reads_importance: ClassVar[bool] = False
    #: Whether it compares that with uniform attention, so that it must be in weights of attention.
    needs_weights: ClassVar[bool] = False
    #: What follows the storage's name and a colon; empty for a storage without parameters.
    parameters: ClassVar[str] = ""

    @classmethod
    def with_parameters(cls, text: str) -> type[Storage]:
        """Returns the storage with what a user has written behind its name and a colon.

        Raises:
            InvalidArgumentError: It has no parameters, or no such ones.
        """
        raise InvalidArgumentError(
            f"expected nothing behind the name of a storage without parameters, got {text!r:.80}"
        )

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
    def encodes_alone(self) -> bool:
        """Whether what is held of a pair depends on that pair alone; what pairs share is in a table or a part."""
        layout = self.layout()
        return not layout.tables and not layout.parts

    @property
    def dense_pair_bytes(self) -> int:
        """Bytes of one key and one value in the model's dtype."""
        return (self.head_dim + self.v_head_dim) * self.dtype.itemsize

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype in which keys and values are computed with: fp32, or fp64 for a model in fp64."""
        return accumulation_dtype(self.dtype)

    @abstractmethod
    def layout(self) -> Layout:
        """Returns what is held, but for positions and scores."""

    @abstractmethod
    def encode(self, new: NewPairs, before: Held | None = None) -> Encoded:
        """Returns what will be held of a dense span.

        Args:
            new: The pairs.
            before: The pairs of the same segments that are there already; None if the segments begin with the span,
                which then makes their tables.
        """

    def staying(self, held: Held, kept: torch.Tensor | None) -> Mapping[str, Staying]:
        """Returns, for each part, what stays of it if of the pairs only those stay that are ``kept``.

        Args:
            held: All pairs.
            kept: ``[total]``, bool; None if all stay.
        """
        return {}

    def check(self, held: Held) -> None:  # noqa: B027  # most storages have nothing that could contradict itself
        """Raises InvalidArgumentError if what is held, which comes from a file, contradicts itself."""

    @abstractmethod
    def decode(self, held: Held) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys ``[total, head_dim]`` and values ``[total, v_head_dim]`` in the model's dtype.

        Args:
            held: The pairs, "positions" among their columns.
        """

    @abstractmethod
    def parts(
        self, query: torch.Tensor, held: Held, num_heads: int, row_index: torch.Tensor | None
    ) -> tuple[Part, ...]:
        """Returns what attention reads of packed pairs, as they are stored; pairs in the model's dtype come first.

        Args:
            query: ``[batch, num_attention_heads, query_length, head_dim]``.
            held: The packed pairs, "positions" among their columns.
            num_heads: Segments of a row.
            row_index: int64 ``[batch]``, the row of packed pairs that each batch row reads; None if that is its own.
        """

    def attend(
        self,
        query: torch.Tensor,
        held: Held,
        tail_keys: torch.Tensor | None,
        tail_values: torch.Tensor | None,
        *,
        row_index: torch.Tensor | None = None,
        **options: Any,
    ) -> Attended:
        """Computes attention to packed pairs, as they are stored, and to a dense tail after them.

        It is exact for what :meth:`decode` returns, and holds no decoded copy of all pairs.

        Args:
            query: ``[batch, num_attention_heads, query_length, head_dim]``.
            held: The packed pairs, "positions" among their columns.
            tail_keys: ``[batch, num_heads, length, head_dim]``, in the model's dtype; None for no tail.
            tail_values: ``[batch, num_heads, length, v_head_dim]``.
            row_index: As in :meth:`parts`.
            options: Those of :func:`kvzip_press.kernels.ragged_attention.ragged_attention`, which also describes the
                result.
        """
        n_segments = len(held.cu_seqlens) - 1
        num_heads = n_segments // max(1, query.shape[0]) if tail_keys is None else tail_keys.shape[1]
        parts = self.parts(query, held, num_heads, row_index)
        options["row_index"] = row_index
        if len(parts) > 1:
            return parted_attention(query, parts, tail_keys, tail_values, **options)
        (part,) = parts
        options |= {"context_query": part.context_query, "context_bias": part.context_bias}
        return ragged_attention(query, part.keys, part.values, part.cu_seqlens, tail_keys, tail_values, **options)
