"""The frozen part of a ragged layer: the kept pairs of all heads, packed one after another.

A pair has an entry in each column: in those in which the storage holds keys and values, in that of positions, and in
that of scores if pairs carry one. The entries are ordered by (batch row, KV head, position); ``cu_seqlens`` marks where
the segment of each (row, head) begins. Some storages have tables besides, with an entry for each segment. Whatever
moves pairs moves all columns, and whatever moves segments all tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import POSITIONS, Attended, Storage
from kvzip_press.kernels import ragged_pack

SCORES = "scores"


@dataclass(frozen=True)
class PackedPairs:
    """The kept key/value pairs of one layer.

    Attributes:
        columns: ``[total_kept, ...]`` each: the storage's own, "positions" (int32, the position of each pair in its own
            row, not counting padding) and, if pairs may be evicted by it later, "scores" (fp32, what each pair got when
            it was read).
        cu_seqlens: ``[num_rows * num_heads + 1]``, int32, starts at 0 and ends at ``total_kept``.
        num_heads: Number of KV heads of the layer.
        storage: How the columns hold keys and values.
        tables: ``[num_rows * num_heads, ...]`` each: what the storage holds for a whole segment.
        pool: The pool of all layers that these tensors are views of, which changes while a model generates; None if
            they are not views of a pool, and frozen.
    """

    columns: Mapping[str, torch.Tensor]
    cu_seqlens: torch.Tensor
    num_heads: int
    storage: Storage
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pool: Any = None

    @classmethod
    def pack(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        keep: torch.Tensor,
        positions: torch.Tensor,
        scores: torch.Tensor | None = None,
        *,
        storage: type[Storage] = ModelDtype,
    ) -> PackedPairs:
        """Copies the pairs where ``keep`` is True into memory of exactly their size.

        Args:
            keys: ``[batch, num_heads, n, head_dim]``.
            values: ``[batch, num_heads, n, v_head_dim]``.
            keep: ``[batch, num_heads, n]``, bool.
            positions: ``[batch, n]``, int32.
            scores: ``[batch, num_heads, n]``, fp32, to be kept with the pairs; None for none.
            storage: How keys and values are stored.
        """
        kind = storage.of(keys, values)
        tables = kind.tables(keys, values, keep, positions)
        columns = _dense_columns(kind, keys, values, tables, positions, scores)
        packed = ragged_pack.pack(tuple(columns.values()), keep)
        return cls(dict(zip(columns, packed.columns, strict=True)), packed.cu_seqlens, keys.shape[1], kind, tables)

    @classmethod
    def joined(cls, parts: Sequence[PackedPairs]) -> PackedPairs:
        """Returns a copy with the rows of all parts, one part after another.

        The parts have the same heads, storage and columns.
        """
        ends = torch.stack([part.cu_seqlens[-1] for part in parts]).cumsum(0)
        starts = torch.nn.functional.pad(ends, (1, 0))
        bounds = [part.cu_seqlens[:-1] + start for part, start in zip(parts, starts, strict=False)]
        columns, tables = (
            {name: torch.cat([getattr(part, kind)[name] for part in parts]) for name in getattr(parts[0], kind)}
            for kind in ("columns", "tables")
        )
        return cls(columns, torch.cat([*bounds, ends[-1:]]).int(), parts[0].num_heads, parts[0].storage, tables)

    @property
    def positions(self) -> torch.Tensor:
        """The position of each pair in its own row, ``[total_kept]``, int32."""
        return self.columns[POSITIONS]

    @property
    def scores(self) -> torch.Tensor | None:
        """The score each pair got when it was read, ``[total_kept]``, fp32; None if the pairs carry none."""
        return self.columns.get(SCORES)

    @property
    def device(self) -> torch.device:
        """The device that the pairs are on."""
        return self.cu_seqlens.device

    @property
    def num_rows(self) -> int:
        """Number of batch rows that the segments belong to."""
        return (self.cu_seqlens.numel() - 1) // self.num_heads

    @property
    def seqlens(self) -> torch.Tensor:
        """Number of kept pairs of each row and head, ``[num_rows, num_heads]``, int32."""
        return self.cu_seqlens.diff().view(self.num_rows, self.num_heads)

    @property
    def pair_bytes(self) -> int:
        """Bytes per pair, over all its columns."""
        return sum(column.shape[1:].numel() * column.element_size() for column in self.columns.values())

    @property
    def segment_bytes(self) -> int:
        """Bytes per segment, over all tables."""
        return sum(table.shape[1:].numel() * table.element_size() for table in self.tables.values())

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that this object holds in memory."""
        return *self.columns.values(), *self.tables.values(), self.cu_seqlens

    def attend(
        self, query: torch.Tensor, tail_keys: torch.Tensor | None, tail_values: torch.Tensor | None, **options: Any
    ) -> Attended:
        """Computes exact attention to these pairs and a dense tail after them: see :meth:`Storage.attend`."""
        return self.storage.attend(query, self.columns, self.tables, self.cu_seqlens, tail_keys, tail_values, **options)

    def frozen(self) -> PackedPairs:
        """Returns these pairs in memory that nothing writes to: this object, or a copy if they lie in a pool."""
        if self.pool is None:
            return self
        return self._each(torch.Tensor.clone)

    def to(self, device: torch.device) -> PackedPairs:
        """Returns these pairs on a device: this object if they are already there, else a copy."""
        if self.device == device:
            return self
        return self._each(lambda tensor: tensor.to(device))

    def head_positions(self, row: int, head: int) -> torch.Tensor:
        """Returns the positions kept by one head, ascending, ``[kept]``, int32."""
        segment = row * self.num_heads + head
        return self.positions[int(self.cu_seqlens[segment]) : int(self.cu_seqlens[segment + 1])].clone()

    def first_pairs(self, row: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the first ``count`` keys and values of every head of a row.

        This is only meaningful for a prefix that no head has lost.

        Returns:
            ``[1, num_heads, count, head_dim]`` and ``[1, num_heads, count, v_head_dim]``, in the model's dtype.
        """
        starts = self.cu_seqlens[row * self.num_heads : (row + 1) * self.num_heads].long()
        index = starts[:, None] + torch.arange(count, device=starts.device)
        segments = slice(row * self.num_heads, (row + 1) * self.num_heads)
        keys, values = self.storage.decode(
            {name: column[index] for name, column in self.columns.items()},
            {name: table[segments] for name, table in self.tables.items()},
        )
        return keys.unsqueeze(0), values.unsqueeze(0)

    def part(self, segments: slice, pairs: slice, cu_seqlens: torch.Tensor, pool: Any) -> PackedPairs:
        """Returns some segments of a pool, as views.

        Args:
            segments: Which they are, as (row, head) in order.
            pairs: Pairs among which theirs are.
            cu_seqlens: Where each begins among these pairs, ``[segments + 1]``.
            pool: The pool.
        """
        columns = {name: column[pairs] for name, column in self.columns.items()}
        tables = {name: table[segments] for name, table in self.tables.items()}
        return replace(self, columns=columns, tables=tables, cu_seqlens=cu_seqlens, pool=pool)

    def with_scores(self, scores: torch.Tensor) -> PackedPairs:
        """Returns the same pairs with other scores, fp32 ``[total_kept]``."""
        return replace(self, columns={**self.columns, SCORES: scores})

    def emptied(self, num_rows: int) -> PackedPairs:
        """Returns an object of the same kind with ``num_rows`` rows and no pairs."""
        columns = {name: column.new_empty(0, *column.shape[1:]) for name, column in self.columns.items()}
        n_segments = num_rows * self.num_heads
        tables = {name: table.new_zeros(n_segments, *table.shape[1:]) for name, table in self.tables.items()}
        return replace(
            self, columns=columns, tables=tables, cu_seqlens=self.cu_seqlens.new_zeros(n_segments + 1), pool=None
        )

    def select_rows(self, rows: Iterable[int]) -> PackedPairs:
        """Returns a copy that holds the given batch rows, in the given order."""
        index = torch.as_tensor(list(rows), dtype=torch.int64, device=self.device)
        own = ragged_pack.Packed(tuple(self.columns.values()), self.cu_seqlens)
        heads = torch.arange(self.num_heads, device=self.device)
        segments = (index[:, None] * self.num_heads + heads).flatten()
        tables = {name: table[segments] for name, table in self.tables.items()}
        return self._replaced(self.columns, ragged_pack.select_rows(own, index, self.num_heads), tables)

    def merge(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor,
        kept: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> PackedPairs:
        """Returns a new object: these pairs and, after them in each head, those of a dense tail where ``keep`` is True.

        Args:
            keys: ``[num_rows, num_heads, t, head_dim]``.
            values: ``[num_rows, num_heads, t, v_head_dim]``.
            positions: ``[num_rows, t]``, int32.
            keep: ``[num_rows, num_heads, t]``, bool.
            kept: ``[total_kept]``, bool: which of these pairs stay; None for all.
            scores: ``[num_rows, num_heads, t]``, fp32, of the tail. If None, these pairs lose theirs; if these have
                none, the tail's are dropped.
        """
        begins = not self.positions.numel()  # the first pairs of all segments, after they were emptied
        tables = self.storage.tables(keys, values, keep, positions) if begins else self.tables
        tail = _dense_columns(self.storage, keys, values, tables, positions, None if self.scores is None else scores)
        own = ragged_pack.Packed(tuple(self.columns[name] for name in tail), self.cu_seqlens)
        merged = self._replaced(tail, ragged_pack.merge(own, tuple(tail.values()), keep, keep_context=kept), tables)
        if kept is None:
            return merged
        return replace(merged, tables=self.storage.tables_after_eviction(tables, merged.positions, merged.cu_seqlens))

    def _replaced(
        self, names: Iterable[str], packed: ragged_pack.Packed, tables: Mapping[str, torch.Tensor]
    ) -> PackedPairs:
        columns = dict(zip(names, packed.columns, strict=True))
        return replace(self, columns=columns, tables=tables, cu_seqlens=packed.cu_seqlens, pool=None)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedPairs:
        columns, tables = (
            {name: change(tensor) for name, tensor in held.items()} for held in (self.columns, self.tables)
        )
        return replace(self, columns=columns, tables=tables, cu_seqlens=change(self.cu_seqlens), pool=None)


def _dense_columns(
    storage: Storage,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
    scores: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Returns all columns of a dense span, ``[batch, num_heads, n, ...]`` each."""
    columns = storage.encode(keys, values, tables)
    columns[POSITIONS] = positions.unsqueeze(1).expand(keys.shape[:3])
    if scores is not None:
        columns[SCORES] = scores
    return columns
