"""A span of tokens whose evicted pairs are kept, and the part of it that belongs to one layer of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvzip_press.budget.policy import Policy
from kvzip_press.cache.codecs.storage import Storage
from kvzip_press.cache.cold.place import Place
from kvzip_press.cache.packed_pairs import PackedPairs

BOUNDS, EVERY_SCORE = "cu_seqlens", "every_score"  # names beside those of the columns


@dataclass(frozen=True, eq=False)
class ColdSpan:
    """All that decides which pairs of a span stay, and the pairs that did not.

    It never changes, so forks of a cache share it, and it goes with the last of them.

    Attributes:
        valid: ``[batch, span]``, bool, False at padding; like the next three, on the CPU.
        positions: ``[batch, span]``, int32.
        protected: ``[batch, span]``, bool: positions that no head loses.
        protected_count: Whether these count towards the budget; or a mask of those that do.
        policy: The policy under which it was evicted.
        uniform: ``[batch, span]``, fp32, as in :class:`~kvzip_press.budget.scores.Scores`; None for other scores.
        storages: ``layer_idx ->`` how the evicted pairs are stored.
        columns: ``layer_idx ->`` names of the columns of these pairs.
        place: Where pairs and the scores of all pairs lie.
        in_chunks: Whether the span was read in chunks: then all its pairs lie there, and those in the cache are not
            the ones that an eviction of the whole at once would have left.
    """

    valid: torch.Tensor
    positions: torch.Tensor
    protected: torch.Tensor
    protected_count: bool | torch.Tensor
    policy: Policy
    uniform: torch.Tensor | None
    storages: Mapping[int, Storage]
    columns: Mapping[int, Sequence[str]]
    place: Place
    in_chunks: bool = False


@dataclass(frozen=True, eq=False)
class ColdPart:
    """What a layer of a cache has of a span.

    Attributes:
        span: The span.
        layer_idx: The layer's index in the model.
        rows: For each packed row of the layer, the row of the span that it is.
    """

    span: ColdSpan
    layer_idx: int
    rows: tuple[int, ...]

    def of_rows(self, rows: Sequence[int]) -> ColdPart:
        """Returns the part of a layer that goes on with these packed rows."""
        return replace(self, rows=tuple(self.rows[row] for row in rows))

    def scores(self) -> torch.Tensor:
        """Returns the scores of all pairs of the span, kept or not, fp32 ``[rows, heads, span]`` on the CPU."""
        return self.span.place.read(self.layer_idx, [EVERY_SCORE])[EVERY_SCORE][list(self.rows)]

    def importance(self) -> torch.Tensor:
        """Returns these scores as an eviction hands them to storages, with infinity where pairs are protected."""
        protected, uniform = self.span.protected[list(self.rows)], self.span.uniform
        scores = self.scores() if uniform is None else self.scores() / uniform[list(self.rows)].unsqueeze(1)
        return scores.masked_fill(protected.unsqueeze(1), torch.inf)

    def pairs(self, *, only_positions: bool = False) -> PackedPairs:
        """Returns the evicted pairs on the CPU, or their positions alone; they must not be written into."""
        i, span = self.layer_idx, self.span
        columns = ["positions"] if only_positions else [*span.columns[i]]
        read = span.place.read(i, [*columns, BOUNDS])
        n_heads = (len(read[BOUNDS]) - 1) // len(span.valid)
        packed = PackedPairs({name: read[name] for name in columns}, read[BOUNDS], n_heads, span.storages[i])
        return packed if self.rows == tuple(range(len(span.valid))) else packed.select_rows(self.rows)
