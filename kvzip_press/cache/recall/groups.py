"""The groups of a layer's pairs: which pairs are in each, and what is noted of it.

They are held beside the pairs (:mod:`kvzip_press.cache.codecs.held`), for the same segments: a column "order" with an
entry for each pair, int32: the pairs of a segment, counted from its beginning, sorted by group, the first tokens before
all others; and two tables. "sizes", int32 ``[segments, 1 + groups]``: the number of first tokens, then of each group's
pairs. "marks", ``[segments, groups, ...]``: what is noted of each. Groups that a segment does not have are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kvzip_press.cache.codecs.held import Held
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.recall.policy import Recall

ORDER, SIZES, MARKS = "order", "sizes", "marks"


@dataclass(frozen=True)
class _Grouped:
    """The groups of one segment's pairs, or of some of them."""

    order: torch.Tensor
    sizes: torch.Tensor
    marks: torch.Tensor


def grouped(recall: Recall, pairs: PackedPairs) -> Held:
    """Returns the groups of all pairs, as they are held."""
    keys, _ = pairs.storage.decode(pairs)
    segments = []
    for start, stop in pairwise(pairs.cu_seqlens.tolist()):
        n_first = int((pairs.positions[start:stop] < recall.n_sink).sum())  # positions ascend in a segment
        segments.append(_grouped(recall, keys[start + n_first : stop], n_first, are_new=False))
    return _held(pairs.cu_seqlens, segments)


def with_new(recall: Recall, groups: Held, cu_seqlens: torch.Tensor, keys: Sequence[torch.Tensor]) -> Held:
    """Returns the groups with new ones, of pairs that were added at the end of each segment.

    Args:
        recall: How they are grouped.
        groups: The groups before.
        cu_seqlens: Where the segments begin now, int32 ``[segments + 1]``.
        keys: The new keys of each segment, ``[n, head_dim]``.
    """
    bounds, orders = groups.cu_seqlens.tolist(), []
    new = [_grouped(recall, own, 0, are_new=True) for own in keys]
    for (start, stop), own in zip(pairwise(bounds), new, strict=True):
        orders += [groups.columns[ORDER][start:stop], own.order + (stop - start)]
    held = _held(cu_seqlens, new)
    tables = {
        SIZES: torch.cat([groups.tables[SIZES], held.tables[SIZES][:, 1:]], 1),
        MARKS: torch.cat([groups.tables[MARKS], held.tables[MARKS]], 1),
    }
    return Held({ORDER: torch.cat(orders)}, cu_seqlens, tables=tables)


def _grouped(recall: Recall, keys: torch.Tensor, n_first: int, *, are_new: bool) -> _Grouped:
    """Groups the pairs behind the first ``n_first`` ones."""
    first = torch.arange(n_first, device=keys.device, dtype=torch.int32)
    if len(keys):
        _, groups = recall.groups(keys, are_new=are_new).unique(return_inverse=True)
        n_groups = int(groups.max()) + 1
    else:
        groups, n_groups = torch.zeros(0, dtype=torch.int64, device=keys.device), 0
    order = torch.cat([first, groups.argsort(stable=True).int() + n_first])
    sizes = torch.cat([first.new_full((1,), n_first), groups.bincount(minlength=n_groups).int()])
    return _Grouped(order, sizes, recall.marks(keys, groups, n_groups))


def _held(cu_seqlens: torch.Tensor, segments: Sequence[_Grouped]) -> Held:
    sizes, marks = (
        torch.nn.utils.rnn.pad_sequence([getattr(own, name) for own in segments], batch_first=True)
        for name in ("sizes", "marks")
    )
    order = torch.cat([own.order for own in segments])
    return Held({ORDER: order}, cu_seqlens, tables={SIZES: sizes, MARKS: marks})
