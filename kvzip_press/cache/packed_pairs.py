"""The frozen part of a ragged layer: the kept pairs of all heads, packed one after another.

A pair has an entry in each column: in those in which the storage holds keys and values, in that of positions, and in
that of scores if pairs carry one. The entries are ordered by (batch row, KV head, position); ``cu_seqlens`` marks where
the segment of each (row, head) begins. Some storages have tables besides, with an entry for each segment, and parts:
see :mod:`kvzip_press.cache.codecs.held`. Whatever moves pairs moves all columns and parts, and whatever moves segments
all tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvzip_press.cache.codecs.held import POSITIONS, Encoded, Held, NewPairs, joined
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Attended, Storage

SCORES = "scores"


@dataclass(frozen=True)
class PackedPairs(Held):
    """The kept key/value pairs of one layer.

    Attributes:
        columns: ``[total_kept, ...]`` each: the storage's own, "positions" (int32, the position of each pair in its own
            row, not counting padding) and, if pairs may be evicted by it later, "scores" (fp32, what each pair got when
            it was read).
        cu_seqlens: ``[num_rows * num_heads + 1]``, int32, starts at 0 and ends at ``total_kept``.
        num_heads: Number of KV heads of the layer.
        storage: How the columns hold keys and values.
        tables: ``[num_rows * num_heads, ...]`` each: what the storage holds for a whole segment.
        parts: What the storage holds that is neither of a pair nor of a segment.
        pool: The pool of all layers that these tensors are views of, which changes while a model generates; None if
            they are not views of a pool, and frozen.
    """

    num_heads: int
    storage: Storage
    pool: Any = None

    @classmethod
    def of(cls, held: Held, num_heads: int, storage: Storage, pool: Any = None) -> PackedPairs:
        """Returns what is held as the pairs of a layer."""
        return cls(held.columns, held.cu_seqlens, num_heads, storage, pool, tables=held.tables, parts=held.parts)

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
        importance: torch.Tensor | None = None,
    ) -> PackedPairs:
        """Copies the pairs where ``keep`` is True into memory of exactly their size.

        Args:
            keys: ``[batch, num_heads, n, head_dim]``.
            values: ``[batch, num_heads, n, v_head_dim]``.
            keep: ``[batch, num_heads, n]``, bool.
            positions: ``[batch, n]``, int32.
            scores: ``[batch, num_heads, n]``, fp32, to be kept with the pairs; None for none.
            storage: How keys and values are stored.
            importance: See :class:`~kvzip_press.cache.codecs.held.NewPairs`.
        """
        kind = storage.of(keys, values)
        new = NewPairs(keys, values, keep, positions, importance)
        return cls.of(_with_columns(kind.encode(new), new, scores).packed(), keys.shape[1], kind)

    @classmethod
    def joined(cls, pairs: Iterable[PackedPairs], total: int, like: PackedPairs) -> PackedPairs:
        """Returns a copy with the rows of all objects, one object after another; each is copied as it comes.

        Args:
            pairs: The objects, at least one, with the same columns.
            total: Number of their pairs together.
            like: Pairs with the same heads and storage: one of them, if they do not come one by one.
        """
        return cls.of(joined(pairs, total), like.num_heads, like.storage)

    def numbers_only(self) -> PackedPairs:
        """Returns the same pairs without what they hold of keys and values: their positions, and scores if any."""
        columns = {name: self.columns[name] for name in (POSITIONS, SCORES) if name in self.columns}
        return replace(self, columns=columns, tables={}, parts={})

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
    def offloaded(self) -> tuple[torch.Tensor, ...]:
        """What lies in host memory to be read on another device, beside :attr:`tensors`: nothing of plain pairs."""
        return ()

    @property
    def num_rows(self) -> int:
        """Number of batch rows that the segments belong to."""
        return (self.cu_seqlens.numel() - 1) // self.num_heads

    @property
    def seqlens(self) -> torch.Tensor:
        """Number of kept pairs of each row and head, ``[num_rows, num_heads]``, int32."""
        return self.cu_seqlens.diff().view(self.num_rows, self.num_heads)

    def row_bytes(self, row: int) -> int:
        """Returns the bytes of a row, were it alone."""
        return self.nbytes(slice(row * self.num_heads, (row + 1) * self.num_heads))

    def attend(
        self, query: torch.Tensor, tail_keys: torch.Tensor | None, tail_values: torch.Tensor | None, **options: Any
    ) -> Attended:
        """Computes exact attention to these pairs and a dense tail after them: see :meth:`Storage.attend`."""
        return self.storage.attend(query, self, tail_keys, tail_values, **options)

    def frozen(self) -> PackedPairs:
        """Returns these pairs in memory that nothing writes to: this object, or a copy if they lie in a pool."""
        if self.pool is None:
            return self
        return self._like(self.each(torch.Tensor.clone))

    def to(self, device: torch.device) -> PackedPairs:
        """Returns these pairs on a device: this object if they are already there, else a copy."""
        if self.device == device:
            return self
        return self._like(self.each(lambda tensor: tensor.to(device)))

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
        alone = self._like(self.within(slice(row * self.num_heads, (row + 1) * self.num_heads), whole=False))
        rank = torch.arange(alone.total, device=self.device) - alone.cu_seqlens[alone.segments_of_entries()]
        storage = self.storage
        keys, values = (
            torch.empty(1, self.num_heads, 0, dim, dtype=storage.dtype, device=self.device)
            for dim in (storage.head_dim, storage.v_head_dim)
        )
        none = torch.empty(1, self.num_heads, 0, device=self.device)
        first = alone.merge(keys, values, none[:, 0].int(), none.bool(), rank < count)
        keys, values = storage.decode(first)
        return (
            keys.view(1, self.num_heads, count, storage.head_dim),
            values.view(1, self.num_heads, count, storage.v_head_dim),
        )

    def split_rows(self, sizes: Sequence[int], num_rows: int, pool: Any) -> list[PackedPairs]:
        """Returns the rows of a pool as views, ``num_rows`` at a time.

        Args:
            sizes: Number of pairs of each run of rows.
            num_rows: Number of rows of each.
            pool: The pool.
        """
        n_segments = num_rows * self.num_heads
        bounds = self.cu_seqlens.unfold(0, n_segments + 1, n_segments)
        bounds = bounds - bounds[:, :1]
        columns = {name: column.split(sizes) for name, column in self.columns.items()}
        tables = {name: table.split(n_segments) for name, table in self.tables.items()}
        runs = [slice(i * n_segments, (i + 1) * n_segments) for i in range(len(sizes))]
        held = [
            Held(
                {name: column[i] for name, column in columns.items()},
                own,
                tables={name: table[i] for name, table in tables.items()},
                parts={name: part.within(run, whole=False) for name, part in self.parts.items()},
            )
            for i, (own, run) in enumerate(zip(bounds.unbind(), runs, strict=True))
        ]
        return [PackedPairs.of(one, self.num_heads, self.storage, pool) for one in held]

    def part(self, segments: slice, pairs: slice, cu_seqlens: torch.Tensor, pool: Any) -> PackedPairs:
        """Returns some segments of a pool, as views.

        Args:
            segments: Which they are, as (row, head) in order.
            pairs: Pairs among which theirs are: theirs, or all.
            cu_seqlens: Where each begins among these pairs, ``[segments + 1]``.
            pool: The pool.
        """
        columns = {name: column[pairs] for name, column in self.columns.items()}
        tables = {name: table[segments] for name, table in self.tables.items()}
        whole = pairs == slice(None)
        parts = {name: part.within(segments, whole=whole) for name, part in self.parts.items()}
        return PackedPairs.of(Held(columns, cu_seqlens, tables=tables, parts=parts), self.num_heads, self.storage, pool)

    def with_scores(self, scores: torch.Tensor) -> PackedPairs:
        """Returns the same pairs with other scores, fp32 ``[total_kept]``."""
        return replace(self, columns={**self.columns, SCORES: scores})

    def emptied(self, num_rows: int) -> PackedPairs:
        """Returns an object of the same kind with ``num_rows`` rows and no pairs."""
        return self._like(self.without_entries(num_rows * self.num_heads))

    def select_rows(self, rows: Iterable[int]) -> PackedPairs:
        """Returns a copy that holds the given batch rows, in the given order."""
        index = torch.as_tensor(list(rows), dtype=torch.int64, device=self.device)
        return self._like(self.of_rows(index, self.num_heads))

    def merge(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor,
        kept: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        *,
        importance: torch.Tensor | None = None,
        total: int | None = None,
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
            importance: See :class:`~kvzip_press.cache.codecs.held.NewPairs`.
            total: How many pairs there are then, if that is known: it is not read from the device.
        """
        new = NewPairs(keys, values, keep, positions, importance)
        begins = not self.total  # the first pairs of all segments, after they were emptied
        encoded = self.storage.encode(new, None if begins else self)
        encoded = _with_columns(encoded, new, None if self.scores is None else scores)
        return self._like(self.merged(encoded, self.storage.staying(self, kept), kept, total))

    def _like(self, held: Held) -> PackedPairs:
        return PackedPairs.of(held, self.num_heads, self.storage)


def _with_columns(encoded: Encoded, new: NewPairs, scores: torch.Tensor | None) -> Encoded:
    """Adds the columns of pairs that no storage has to make."""
    columns = {**encoded.columns, POSITIONS: new.positions.unsqueeze(1).expand(new.keep.shape)}
    if scores is not None:
        columns[SCORES] = scores
    return replace(encoded, columns=columns)
