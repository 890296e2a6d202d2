"""Puts pairs of a cache and evicted ones together, as if they had been packed at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvzip_press.cache.cold.span import ColdPart
from kvzip_press.cache.packed_pairs import SCORES, PackedPairs
from kvzip_press.errors import UnsupportedCacheError


@dataclass(frozen=True)
class Places:
    """Finds the columns of a span that packed pairs are, by their positions.

    Attributes:
        valid: ``[rows, span]``, bool, False at padding; on the CPU, like the next.
        positions: ``[rows, span]``, int32; those of valid columns differ from each other in a row.
    """

    valid: torch.Tensor
    positions: torch.Tensor

    @cached_property
    def _columns(self) -> torch.Tensor:
        """``[rows, positions]``, int64: the column of each position of a row; -1 for positions outside of the span."""
        positions = self.positions.long().masked_fill(~self.valid, -1)
        rows, columns = self.valid.nonzero(as_tuple=True)
        table = torch.full((len(positions), int(positions.max()) + 1), -1)
        table[rows, positions[rows, columns]] = columns
        return table

    def find(self, packed: PackedPairs) -> torch.Tensor:
        """Returns the index in ``[rows, heads, span]``, flattened, of each pair; -1 for pairs outside of the span."""
        table, position = self._columns.to(packed.device), packed.columns["positions"].long()
        segment = packed.segments_of_entries()
        inside = position < table.shape[1]
        column = table[segment // packed.num_heads, position.clamp(max=table.shape[1] - 1)]
        return torch.where(inside & (column >= 0), segment * self.valid.shape[1] + column, -1)

    def mask(self, packed: PackedPairs) -> torch.Tensor:
        """Returns which pairs of the span are among these, bool ``[rows, heads, span]``."""
        found = self.find(packed)
        mask = found.new_zeros(packed.num_rows, packed.num_heads, self.valid.shape[1], dtype=torch.bool)
        mask.view(-1)[found[found >= 0]] = True
        return mask


def joined(
    packed: PackedPairs, cold: PackedPairs, places: Places, keep: torch.Tensor, back: torch.Tensor
) -> PackedPairs:
    """Returns pairs of which those of a span are the kept ones, in order, for a storage that encodes each pair alone.

    Args:
        packed: The pairs of a layer.
        cold: The evicted pairs of the span, on the CPU; only those that come back are moved.
        places: The columns of the span.
        keep: ``[rows, heads, span]``, bool.
        back: ``[rows, heads, span]``, bool: those that come from ``cold``.
    """
    device, found = packed.device, places.find(packed)
    stays = (found < 0) | keep.view(-1)[found.clamp(min=0)]
    taken = back.cpu().view(-1)[places.find(cold)]
    segment = torch.cat([packed.segments_of_entries()[stays], cold.segments_of_entries()[taken].to(device)])
    columns = {
        name: torch.cat([column[stays], cold.columns[name][taken].to(device)])
        for name, column in packed.columns.items()
    }
    position = columns["positions"].long()
    order = (segment * (int(position.max()) + 1) + position).argsort() if len(position) else position
    bounds = torch.bincount(segment, minlength=len(packed.cu_seqlens) - 1).cumsum(0)
    columns = {name: column[order] for name, column in columns.items()}
    cu_seqlens = torch.nn.functional.pad(bounds, (1, 0)).int()
    return replace(packed, columns=columns, cu_seqlens=cu_seqlens, pool=None)


def packed_again(packed: PackedPairs, part: ColdPart, places: Places, keep: torch.Tensor) -> PackedPairs:
    """Returns the kept pairs of a span, packed from all its pairs as the model made them.

    Raises:
        UnsupportedCacheError: The layer holds pairs of a later turn, which cannot be encoded anew.
    """
    if bool((places.find(packed) < 0).any()):
        raise UnsupportedCacheError(
            "expected a cache of one turn, or with its later turns in the tail, in the storage "
            f"{type(packed.storage).__name__}, which encodes a pair by what else is kept, got one with a later "
            "turn that a press has compressed"
        )
    cold = part.pairs().to(packed.device)
    found, shape = places.find(cold), tuple(keep.shape)

    def dense(column: torch.Tensor) -> torch.Tensor:
        flat = column.new_zeros(keep.numel(), *column.shape[1:])
        flat[found] = column
        return flat.view(*shape, *column.shape[1:])

    scores = dense(cold.columns[SCORES]) if SCORES in packed.columns else None
    positions = places.positions.to(packed.device)
    keys, values = dense(cold.columns["keys"]), dense(cold.columns["values"])
    importance = part.importance().to(packed.device) if packed.storage.reads_importance else None
    return PackedPairs.pack(keys, values, keep, positions, scores, storage=type(packed.storage), importance=importance)
