"""The frozen part of a ragged layer: the kept pairs of all heads, packed one after another.

Rows of ``keys`` and ``values`` are ordered by (batch row, KV head, position); ``cu_seqlens`` marks where the segment of
each (row, head) begins. Other kinds of storage (quantized rows, pages) can take this object's place behind the layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.kernels import ragged_pack


@dataclass(frozen=True)
class PackedPairs:
    """The kept key/value pairs of one layer.

    Attributes:
        keys: ``[total_kept, head_dim]``, model dtype, keys after RoPE at their original positions.
        values: ``[total_kept, v_head_dim]``, model dtype.
        positions: ``[total_kept]``, int32, the position of each pair in its own row (padding not counted).
        cu_seqlens: ``[num_rows * num_heads + 1]``, int32, starts at 0 and ends at ``total_kept``.
        num_heads: KV heads of the layer.
        scores: ``[total_kept]``, fp32, what each pair got when it was read; None where nothing is evicted later by it.
        pool: The storage of all layers that these tensors are views of, which changes while a model writes; None where
            they are their own, and frozen.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    num_heads: int
    scores: torch.Tensor | None = None
    pool: Any = None

    @classmethod
    def pack(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        keep: torch.Tensor,
        positions: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> PackedPairs:
        """Copies the pairs where ``keep`` is True into storage of exactly their size.

        Args:
            keys: ``[batch, num_heads, n, head_dim]``.
            values: ``[batch, num_heads, n, v_head_dim]``.
            keep: ``[batch, num_heads, n]``, bool.
            positions: ``[batch, n]``, int32.
            scores: ``[batch, num_heads, n]``, fp32, to be kept with the pairs.
        """
        carried = None if scores is None else scores[keep]
        return cls(*ragged_pack.pack(keys, values, keep, positions), num_heads=keys.shape[1], scores=carried)

    @property
    def num_rows(self) -> int:
        """Batch rows that the segments belong to."""
        return (self.cu_seqlens.numel() - 1) // self.num_heads

    @property
    def seqlens(self) -> torch.Tensor:
        """Kept pairs of each row and head, ``[num_rows, num_heads]``, int32."""
        return self.cu_seqlens.diff().view(self.num_rows, self.num_heads)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Everything that this object holds in memory."""
        return self.keys, self.values, self.positions, self.cu_seqlens

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values."""
        return self.keys, self.values

    def frozen(self) -> PackedPairs:
        """These pairs in storage that nobody writes into: themselves, or a copy of what lies in a pool."""
        if self.pool is None:
            return self
        keys, values, positions, cu_seqlens = (tensor.clone() for tensor in self.tensors)
        scores = None if self.scores is None else self.scores.clone()
        return PackedPairs(keys, values, positions, cu_seqlens, self.num_heads, scores)

    def row(self, row: int) -> PackedPairs:
        """One batch row, as views."""
        bounds = self.cu_seqlens[row * self.num_heads : (row + 1) * self.num_heads + 1]
        start, end = int(bounds[0]), int(bounds[-1])
        return PackedPairs(
            self.keys[start:end], self.values[start:end], self.positions[start:end], bounds - start, self.num_heads
        )

    def head_positions(self, row: int, head: int) -> torch.Tensor:
        """Positions kept by one head, ascending, ``[kept]``, int32."""
        segment = row * self.num_heads + head
        return self.positions[int(self.cu_seqlens[segment]) : int(self.cu_seqlens[segment + 1])].clone()

    def first_pairs(self, row: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``count`` keys and values of every head of a row, ``[1, num_heads, count, head_dim]``.

        Only meaningful for a prefix that no head has lost.
        """
        starts = self.cu_seqlens[row * self.num_heads : (row + 1) * self.num_heads].long()
        index = starts[:, None] + torch.arange(count, device=starts.device)
        return self.keys[index].unsqueeze(0), self.values[index].unsqueeze(0)

    def select_rows(self, rows: Iterable[int]) -> PackedPairs:
        """A copy that holds the given batch rows, in their order."""
        index = torch.as_tensor(list(rows), dtype=torch.int64, device=self.keys.device)
        selected = ragged_pack.select_rows(*self.tensors, index, self.num_heads)
        if self.scores is None:
            return PackedPairs(*selected, num_heads=self.num_heads)
        column = self.scores.unsqueeze(-1)
        scores = ragged_pack.select_rows(column, column, *self.tensors[2:], index, self.num_heads).keys.squeeze(-1)
        return PackedPairs(*selected, num_heads=self.num_heads, scores=scores)

    def merge(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor,
        kept: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> PackedPairs:
        """A new object: these pairs, and behind them in each head those of a dense tail where ``keep`` is True.

        Args:
            keys: ``[num_rows, num_heads, t, head_dim]``.
            values: ``[num_rows, num_heads, t, v_head_dim]``.
            positions: ``[num_rows, t]``, int32.
            keep: ``[num_rows, num_heads, t]``, bool.
            kept: ``[total_kept]``, bool, which of these pairs stay; None for all.
            scores: ``[num_rows, num_heads, t]``, fp32, of the tail, where these pairs have scores too.
        """
        merged = ragged_pack.merge(*self.tensors, keys, values, positions, keep, keep_context=kept)
        if self.scores is None or scores is None:
            return PackedPairs(*merged, num_heads=self.num_heads)
        column, new = self.scores.unsqueeze(-1), scores.unsqueeze(-1)
        carried = ragged_pack.merge(
            column, column, *self.tensors[2:], new, new, positions, keep, keep_context=kept
        ).keys.squeeze(-1)
        return PackedPairs(*merged, num_heads=self.num_heads, scores=carried)
