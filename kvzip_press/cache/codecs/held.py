"""What is held of segments in memory, and how pairs come into it, leave it and are moved, whatever a storage holds.

A segment is all pairs of a (row, head). A *column* has an entry for each pair, a *table* one for each segment. A *part*
is for what is neither: a group of pairs that share scales, or those pairs of a segment that are stored in another way.
It has segments, columns and tables of its own, so all that is said here of pairs holds for its entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from kvzip_press.kernels import ragged_pack

POSITIONS = "positions"  # the column that every storage finds beside its own
CU_SEQLENS = "cu_seqlens"


@dataclass(frozen=True)
class NewPairs:
    """Keys and values of a dense span, of which some are to be stored.

    Attributes:
        keys: ``[batch, num_heads, n, head_dim]``, after RoPE; what is not kept may be anything.
        values: ``[batch, num_heads, n, v_head_dim]``.
        keep: ``[batch, num_heads, n]``, bool.
        positions: ``[batch, n]``, int32.
        importance: ``[batch, num_heads, n]``, fp32, higher is more important, in units of uniform attention if it is
            attention; None if all pairs are the most important.
    """

    keys: torch.Tensor
    values: torch.Tensor
    keep: torch.Tensor
    positions: torch.Tensor
    importance: torch.Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """Entries of a dense span, as they will be held.

    Attributes:
        columns: ``[batch, num_heads, n, ...]`` each, by name.
        keep: ``[batch, num_heads, n]``, bool: which entries are there.
        tables: ``[batch * num_heads, ...]`` each, by name; those of the segments that the span belongs to.
        parts: Entries of other kinds, by the name of the part.
    """

    columns: Mapping[str, torch.Tensor]
    keep: torch.Tensor
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parts: Mapping[str, Encoded] = field(default_factory=dict)

    def packed(self) -> Held:
        """Returns the entries that are there, in memory of exactly their size."""
        packed = ragged_pack.pack(tuple(self.columns.values()), self.keep)
        columns = dict(zip(self.columns, packed.columns, strict=True))
        parts = {name: part.packed() for name, part in self.parts.items()}
        return Held(columns, packed.cu_seqlens, tables=self.tables, parts=parts)


@dataclass(frozen=True)
class Held:
    """Entries of segments, ordered by segment.

    Attributes:
        columns: ``[total, ...]`` each, by name.
        cu_seqlens: ``[segments + 1]``, int32, where the entries of each segment begin, from 0 to ``total``. In a view
            of some segments of a pool it may be a slice, beside the columns of the whole pool.
        tables: ``[segments, ...]`` each, by name.
        parts: What is held of the same segments and is not of pairs, by name.
    """

    columns: Mapping[str, torch.Tensor]
    cu_seqlens: torch.Tensor
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    parts: Mapping[str, Held] = field(default_factory=dict, kw_only=True)

    @property
    def total(self) -> int:
        """Number of entries."""
        return len(next(iter(self.columns.values())))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that this object holds in memory."""
        return tuple(self.by_name().values())

    def by_name(self) -> dict[str, torch.Tensor]:
        """Returns everything that this object holds in memory; of a part ``p``, a column ``c`` is ``p.c``."""
        named = {**self.columns, **self.tables, CU_SEQLENS: self.cu_seqlens}
        for part, held in self.parts.items():
            named |= {f"{part}.{name}": tensor for name, tensor in held.by_name().items()}
        return named

    def segments_of_entries(self) -> torch.Tensor:
        """Returns the segment that each entry belongs to, ``[total]``, int64."""
        segments = torch.arange(len(self.cu_seqlens) - 1, device=self.cu_seqlens.device)
        return segments.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.total)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a pair, or of another entry, over all columns."""
        return sum(column.shape[1:].numel() * column.element_size() for column in self.columns.values())

    def nbytes(self, segments: slice) -> int:
        """Returns the bytes of some segments, were they alone."""
        lengths = self.cu_seqlens.diff()[segments]
        table = sum(table.shape[1:].numel() * table.element_size() for table in self.tables.values())
        bounds = (len(lengths) + 1) * self.cu_seqlens.element_size()
        parts = sum(part.nbytes(segments) for part in self.parts.values())
        return int(lengths.sum()) * self.pair_bytes + len(lengths) * table + bounds + parts

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Held:
        """Returns what is held after a change to each tensor."""
        columns, tables = ({n: change(t) for n, t in held.items()} for held in (self.columns, self.tables))
        parts = {name: part.each(change) for name, part in self.parts.items()}
        return Held(columns, change(self.cu_seqlens), tables=tables, parts=parts)

    def without_entries(self, n_segments: int) -> Held:
        """Returns an object of the same kind with no entries."""
        columns = {name: column.new_empty(0, *column.shape[1:]) for name, column in self.columns.items()}
        tables = {name: table.new_zeros(n_segments, *table.shape[1:]) for name, table in self.tables.items()}
        parts = {name: part.without_entries(n_segments) for name, part in self.parts.items()}
        return Held(columns, self.cu_seqlens.new_zeros(n_segments + 1), tables=tables, parts=parts)

    def within(self, segments: slice, *, whole: bool) -> Held:
        """Returns some segments as views.

        Args:
            segments: Which they are.
            whole: Whether columns stay those of all segments, of which ``cu_seqlens`` is then a slice: nothing is read
                from the device for it.
        """
        bounds = self.cu_seqlens[segments.start : segments.stop + 1]
        columns = self.columns
        if not whole:
            first, last = bounds[[0, -1]].tolist()
            columns, bounds = {name: column[first:last] for name, column in columns.items()}, bounds - bounds[0]
        tables = {name: table[segments] for name, table in self.tables.items()}
        parts = {name: part.within(segments, whole=whole) for name, part in self.parts.items()}
        return Held(columns, bounds, tables=tables, parts=parts)

    def of_rows(self, rows: torch.Tensor, num_heads: int) -> Held:
        """Returns a copy of the given batch rows, int64 ``[new_rows]``, of ``num_heads`` segments each."""
        packed = ragged_pack.select_rows(self._packed(self.columns), rows, num_heads)
        segments = (rows[:, None] * num_heads + torch.arange(num_heads, device=rows.device)).flatten()
        tables = {name: table[segments] for name, table in self.tables.items()}
        parts = {name: part.of_rows(rows, num_heads) for name, part in self.parts.items()}
        return Held(dict(zip(self.columns, packed.columns, strict=True)), packed.cu_seqlens, tables=tables, parts=parts)

    def merged(
        self, new: Encoded, staying: Mapping[str, Staying], kept: torch.Tensor | None, total: int | None = None
    ) -> Held:
        """Returns the entries that stay and, behind them in each segment, new ones; columns and tables are the new's.

        Args:
            new: The new entries.
            staying: What stays of each part.
            kept: ``[total]``, bool: which entries stay; None for all.
            total: How many entries there are then, if that is known.
        """
        own, columns_of_new = self._packed(new.columns), tuple(new.columns.values())
        packed = ragged_pack.merge(own, columns_of_new, new.keep, keep_context=kept, total=total)
        parts = {name: staying[name].held.merged(part, {}, staying[name].kept) for name, part in new.parts.items()}
        columns = dict(zip(new.columns, packed.columns, strict=True))
        return Held(columns, packed.cu_seqlens, tables=new.tables, parts=parts)

    def _packed(self, names: Iterable[str]) -> ragged_pack.Packed:
        return ragged_pack.Packed(tuple(self.columns[name] for name in names), self.cu_seqlens)


@dataclass(frozen=True)
class Staying:
    """What stays of a part when pairs go.

    Attributes:
        held: The part, whose columns may have changed with the pairs that went.
        kept: ``[total]``, bool: which of its entries stay; None for all.
    """

    held: Held
    kept: torch.Tensor | None


def joined(held: Iterable[Held], total: int) -> Held:
    """Returns a copy with the segments of all objects, which are of one kind, one object after another.

    Each is copied and let go before the next one is asked for, so that one that is made for this does not stay in
    memory; but for its parts, of which it is not known before how many entries there are together.

    Args:
        held: The objects, at least one.
        total: Number of their entries together.
    """
    columns: dict[str, torch.Tensor] = {}
    bounds, tables, parts, begin, end = [], [], [], 0, 0
    for one in held:
        begin, end = end, end + one.total
        for name, column in one.columns.items():
            if name not in columns:
                columns[name] = column.new_empty(total, *column.shape[1:])
            columns[name][begin:end] = column
        bounds.append(one.cu_seqlens + begin)
        tables.append(one.tables)
        parts.append(one.parts)
        del one, column
    assert end == total, f"expected {total} entries, got {end}"
    of_parts = {name: [each[name] for each in parts] for name in parts[0]}
    return Held(
        columns,
        torch.cat([*(each[:-1] for each in bounds[:-1]), bounds[-1]]).int(),
        tables={name: torch.cat([each[name] for each in tables]) for name in tables[0]},
        parts={name: joined(each, sum(part.total for part in each)) for name, each in of_parts.items()},
    )
