"""The storages "kivi4" and "kivi2": keys with a scale for each channel of a few tokens, values with one for a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvzip_press.cache.codecs.held import Encoded, Held, NewPairs, Staying
from kvzip_press.cache.codecs.row_storage import BLOCK, RowStorage, codes_in, encoded_rows
from kvzip_press.cache.codecs.storage import Layout
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.ragged_pack.indices import cumulated
from kvzip_press.kernels.row_codec import Codes, encode_groups, groups_of

GROUP = 32  # tokens whose keys share scales
GROUPS, SCALES, MEMBERS = "groups", "key_scales", "members"


@dataclass(frozen=True)
class Kivi4(RowStorage):
    """Stores keys and values in 4 bits; 32 keys of a head share a scale and a zero for each channel.

    A channel of keys has about the same numbers for all tokens, and some channels have far larger ones than others, so
    keys are measured by channels (KIVI, arXiv 2402.02750), and values, which have no such channels, by rows.

    The pairs of a head that are packed together are grouped in order; the last group may be short. It is not filled
    later, since its keys would have to be encoded again. A group whose members are evicted keeps its scales for those
    that stay, whose codes are as they were, and goes with the last one. Groups are a part of what is held; a group
    counts its members, which are neighbours, so no pair has to say where it belongs.
    """

    key_format: ClassVar[str] = "int4"
    value_format: ClassVar[str] = "int4"

    def layout(self) -> Layout:
        """Returns the shapes of codes and of values' scales, and of the scales and zeros of a group."""
        columns = super().layout().columns
        columns = {name: shape for name, shape in columns.items() if name != SCALES}
        groups = Layout({SCALES: (torch.bfloat16, (2 * self.head_dim,)), MEMBERS: (torch.uint8, ())})
        return Layout(columns, parts={GROUPS: groups})

    def encode(self, new: NewPairs, before: Held | None = None) -> Encoded:
        """Returns codes, scales of values, and groups of the pairs that are kept."""
        keep, lengths = new.keep, new.keep.sum(dim=2)
        bounds = cumulated(lengths.flatten()).int()
        total = int(bounds[-1])
        groups, n_groups = groups_of(bounds, total, GROUP)
        encoded = list(_in_blocks(new.keys[keep], groups, n_groups, self.key_format))
        key_codes = encoded[0].codes.new_zeros(*keep.shape, encoded[0].codes.shape[1])
        key_codes[keep] = torch.cat([part.codes for part in encoded])
        counts = (lengths + GROUP - 1) // GROUP
        there = torch.arange(-(-keep.shape[2] // GROUP), device=keep.device) < counts.unsqueeze(-1)
        scales = torch.zeros(*there.shape, 2 * self.head_dim, dtype=torch.bfloat16, device=keep.device)
        scales[there] = torch.cat([part.scales for part in encoded]).flatten(1)
        members = torch.zeros(there.shape, dtype=torch.uint8, device=keep.device)
        members[there] = torch.bincount(groups, minlength=n_groups).to(torch.uint8)
        values = encoded_rows("value", self.value_format, new.values)
        parts = {GROUPS: Encoded({SCALES: scales, MEMBERS: members}, there)}
        return Encoded({"key_codes": key_codes, **values}, keep, parts=parts)

    def staying(self, held: Held, kept: torch.Tensor | None) -> Mapping[str, Staying]:
        """Returns the groups that have a member left."""
        groups = held.parts[GROUPS]
        if kept is None:
            return {GROUPS: Staying(groups, None)}
        members = torch.zeros(groups.total, dtype=torch.int64, device=kept.device)
        members.index_add_(0, _group_of_pairs(held), kept.long())
        columns = {**groups.columns, MEMBERS: members.to(torch.uint8)}
        return {GROUPS: Staying(replace(groups, columns=columns), members > 0)}

    def check(self, held: Held) -> None:
        """Raises InvalidArgumentError unless the groups of each segment have as many members as it has pairs."""
        groups = held.parts[GROUPS]
        members = groups.columns[MEMBERS].long()
        counted = members.new_zeros(len(held.cu_seqlens) - 1).index_add_(0, groups.segments_of_entries(), members)
        if bool((members == 0).any()) or not torch.equal(counted, held.cu_seqlens.diff().long()):
            raise InvalidArgumentError("expected groups with as many members as there are pairs, got others")

    def codes(self, held: Held) -> tuple[Codes, Codes]:
        """Returns the columns as codes of keys, in groups, and of values."""
        scales = held.parts[GROUPS].columns[SCALES].view(-1, self.head_dim, 2)
        keys = Codes(held.columns["key_codes"], scales, self.key_format, _group_of_pairs(held).int())
        return keys, codes_in(held, "value", self.value_format)


@dataclass(frozen=True)
class Kivi2(Kivi4):
    """Stores keys and values in 2 bits; else as :class:`Kivi4`."""

    key_format: ClassVar[str] = "int2"
    value_format: ClassVar[str] = "int2"


def _group_of_pairs(held: Held) -> torch.Tensor:
    """Returns the group of each pair, int64 ``[total]``, without waiting for the device."""
    members = held.parts[GROUPS].columns[MEMBERS]
    groups = torch.arange(len(members), device=members.device)
    return groups.repeat_interleave(members.long(), output_size=held.total)


def _in_blocks(rows: torch.Tensor, groups: torch.Tensor, n_groups: int, form: str) -> Iterator[Codes]:
    """Yields rows ``[n, head_dim]`` as codes, whole groups at a time, at least once."""
    step = BLOCK // GROUP
    firsts = torch.arange(0, n_groups + step, step, device=groups.device)
    bounds = torch.searchsorted(groups, firsts.int()).tolist()
    for number, (start, stop) in enumerate(zip(bounds, [*bounds[1:], len(rows)], strict=True)):
        count = min(step, n_groups - number * step)
        if count > 0 or not number:
            yield encode_groups(rows[start:stop], groups[start:stop] - number * step, max(count, 0), form)
