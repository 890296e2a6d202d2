"""The packed pairs of a layer of which a decode step reads only some; they may lie in host memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvzip_press.cache.codecs.held import Held
from kvzip_press.cache.codecs.storage import Attended
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.recall.groups import grouped, with_new
from kvzip_press.cache.recall.policy import Recall
from kvzip_press.cache.recall.ranking import listed
from kvzip_press.errors import UnsupportedCacheError

_HOST = torch.device("cpu")
_Lists = tuple[torch.Tensor, torch.Tensor]  # the pairs, and where each list begins
_Tail = tuple[torch.Tensor | None, torch.Tensor | None]  # keys and values


@dataclass(frozen=True)
class RecalledPairs(PackedPairs):
    """Packed pairs that are divided into groups, of which a forward of one token reads the best.

    A forward of several tokens (a question, a later turn) reads all pairs. Whatever changes pairs changes their groups:
    new pairs get groups of their own; where pairs have gone, all are grouped again.

    Attributes:
        groups: The groups, as :mod:`kvzip_press.cache.recall.groups` holds them.
        recall: How pairs are grouped and ranked.
        width: Pairs that the longest list of a step has.
        is_offloaded: Whether the columns lie in host memory; ``cu_seqlens`` and the groups do not.
    """

    groups: Held = field(kw_only=True)
    recall: Recall = field(kw_only=True)
    width: int = field(kw_only=True)
    is_offloaded: bool = field(kw_only=True)

    @classmethod
    def made_of(cls, pairs: PackedPairs, recall: Recall, *, offload: bool) -> RecalledPairs:
        """Groups the pairs of a layer.

        Args:
            pairs: The pairs; their columns are shared, or copied to host memory.
            recall: How they are grouped.
            offload: Whether they go to host memory.

        Raises:
            UnsupportedCacheError: Pairs are stored in a way that needs the others of their head, or may be evicted
                while the model writes.
        """
        if not pairs.storage.encodes_alone:
            raise UnsupportedCacheError(
                "expected pairs that are each stored by themselves (storage 'model', 'int8' or 'fp8') to recall some, "
                f"got {type(pairs.storage).__name__}"
            )
        if pairs.pool is not None:
            raise UnsupportedCacheError(
                "expected frozen pairs to recall, got those of a pool that evicts: fork() first"
            )
        columns = {name: column.to(_HOST) for name, column in pairs.columns.items()} if offload else pairs.columns
        return cls(
            columns,
            pairs.cu_seqlens,
            pairs.num_heads,
            pairs.storage,
            groups=grouped(recall, pairs),
            recall=recall,
            width=_width(pairs, recall),
            is_offloaded=offload,
        )

    def everything(self, device: torch.device | None = None) -> PackedPairs:
        """Returns plain pairs, which are all read: on a device, or where their columns lie."""
        device = next(iter(self.columns.values())).device if device is None else device
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return PackedPairs(columns, self.cu_seqlens.to(device), self.num_heads, self.storage)

    # Reading --------------------------------------------------------------------------------------------------------

    def attend(
        self, query: torch.Tensor, tail_keys: torch.Tensor | None, tail_values: torch.Tensor | None, **options: Any
    ) -> Attended:
        """Attends to the pairs that the query ranks first, and to the whole tail; with several tokens, to all pairs.

        The arguments are those of :meth:`kvzip_press.cache.codecs.storage.Storage.attend`.
        """
        if query.shape[2] > 1 or not self.width:
            return self.everything(query.device).attend(query, tail_keys, tail_values, **options)
        row_index, options["part_of_storage"] = options.pop("row_index", None), True
        lists = listed(
            self.recall,
            self.groups,
            query,
            self.num_heads,
            row_index=row_index,
            scaling=options.get("scaling"),
            width=self.width,
        )
        attend_to = self._attend_by_query_head if self.recall.per_query_head else self._attend_to
        return attend_to(query, lists, (tail_keys, tail_values), options)

    def _attend_to(self, query: torch.Tensor, lists: _Lists, tail: _Tail, options: dict[str, Any]) -> Attended:
        """Attends to listed pairs: where they lie, or to a copy if they lie elsewhere or are codes."""
        pairs, bounds = lists
        if self.storage.reads_lists and not self.is_offloaded:
            return self.storage.attend(query, Held(self.columns, bounds), *tail, pair_index=pairs, **options)
        return self.storage.attend(query, Held(self._copied(pairs, query.device), bounds), *tail, **options)

    def _attend_by_query_head(
        self, query: torch.Tensor, lists: _Lists, tail: _Tail, options: dict[str, Any]
    ) -> Attended:
        """Attends with a list for each query head: a group of heads becomes a row whose members share the tail."""
        batch, heads, n_tokens, dim = query.shape
        members = heads // self.num_heads
        keys, values = (None if one is None else one.flatten(0, 1)[:, None].expand(-1, members, -1, -1) for one in tail)
        if (mask := options.get("tail_mask")) is not None:
            mask = mask.expand(batch, heads, -1, -1)
            options["tail_mask"] = mask.reshape(batch * self.num_heads, members, *mask.shape[2:])
        folded = query.reshape(batch * self.num_heads, members, n_tokens, dim)
        attended = self._attend_to(folded, lists, (keys, values), options)
        if isinstance(attended, torch.Tensor):
            return attended.reshape(batch, heads, n_tokens, -1)
        out, lse = attended
        return out.reshape(batch, heads, n_tokens, -1), lse.reshape(batch, heads, n_tokens)

    def _copied(self, pairs: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns the columns of listed pairs on a device; what is behind the lists is copied too, and never read."""
        index = pairs.clamp(0, self.total - 1).to(next(iter(self.columns.values())).device)
        copied = {}
        for name, column in self.columns.items():
            pinned = self.is_offloaded and device.type == "cuda"
            staged = column.new_empty(len(index), *column.shape[1:], pin_memory=pinned)
            torch.index_select(column, 0, index, out=staged)
            copied[name] = staged.to(device, non_blocking=True)
        return copied

    # Memory ---------------------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that this object holds on the device that it is read on."""
        held = (*self.groups.tensors, self.cu_seqlens)
        return held if self.is_offloaded else (*held, *self.columns.values())

    @property
    def offloaded(self) -> tuple[torch.Tensor, ...]:
        """Everything that it holds in host memory, to be read elsewhere."""
        return tuple(self.columns.values()) if self.is_offloaded else ()

    def to(self, device: torch.device) -> RecalledPairs:
        """Returns these pairs on a device; those in host memory stay there, and are read on that device."""
        if self.device == device:
            return self
        groups = self.groups.each(lambda tensor: tensor.to(device))
        columns = self.columns
        if not self.is_offloaded:
            columns = {name: column.to(device) for name, column in columns.items()}
        return replace(self, columns=columns, cu_seqlens=self.cu_seqlens.to(device), groups=groups)

    # Changes --------------------------------------------------------------------------------------------------------

    def first_pairs(self, row: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`PackedPairs.first_pairs`."""
        keys, values = self.everything().first_pairs(row, count)
        return keys.to(self.device), values.to(self.device)

    def emptied(self, num_rows: int) -> RecalledPairs:
        """Returns an object of the same kind with ``num_rows`` rows and no pairs."""
        groups = self.groups.without_entries(num_rows * self.num_heads)
        return self._with(self.everything().emptied(num_rows), groups)

    def select_rows(self, rows: Iterable[int]) -> RecalledPairs:
        """Returns a copy that holds the given batch rows, in the given order."""
        chosen = list(rows)
        index = torch.as_tensor(chosen, dtype=torch.int64, device=self.device)
        return self._with(self.everything().select_rows(chosen), self.groups.of_rows(index, self.num_heads))

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
    ) -> RecalledPairs:
        """See :meth:`PackedPairs.merge`."""
        before = self.everything()
        moved = [
            None if one is None else one.to(before.device) for one in (keys, values, positions, keep, kept, scores)
        ]
        merged = before.merge(*moved, importance=importance, total=total)  # type: ignore[arg-type]  # the first four are given
        if kept is not None and not bool(kept.all()):
            again = grouped(self.recall, merged).each(lambda tensor: tensor.to(self.device))
            return self._with(merged, again)
        new = [own[where] for own, where in zip(keys.flatten(0, 1), keep.flatten(0, 1), strict=True)]
        bounds = merged.cu_seqlens.to(self.device)
        return self._with(merged, with_new(self.recall, self.groups, bounds, new))

    def _with(self, pairs: PackedPairs, groups: Held) -> RecalledPairs:
        """Returns other pairs, whose columns lie where these lie, with their groups."""
        bounds, width = groups.cu_seqlens, _width(pairs, self.recall)
        return replace(self, columns=pairs.columns, cu_seqlens=bounds, groups=groups, width=width)


def _width(pairs: PackedPairs, recall: Recall) -> int:
    """Returns how long the longest list of a step is, which no step has to read from the device."""
    return min(recall.budget, int(pairs.seqlens.max())) if pairs.num_rows else 0
