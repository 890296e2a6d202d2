"""The tails of the layers of a pool: the same tokens in the same columns, in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvzip_press.cache.ragged_layer import RaggedLayer


@dataclass(frozen=True)
class Tails:
    """What layers have read since the last eviction.

    Attributes:
        ends: int64 ``[batch]``, the position after each row.
        valid: Bool ``[batch, n]``, which columns are tokens, not padding.
        positions: int32 ``[batch, n]``.
        scores: fp32 ``[layers * batch, heads, n]``, layer by layer; NaN at tokens that have none.
    """

    ends: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[RaggedLayer]) -> Tails:
        """Returns the tails of layers."""
        first = layers[0]
        ends = first.next_positions
        columns = torch.arange(first.tail.length, device=ends.device)
        padding = 0 if first.tail.padding is None else first.tail.padding.unsqueeze(1)
        positions = ends.unsqueeze(1) - first.tail.length + columns
        valid = (columns >= padding).expand_as(positions)
        scores = [layer.tail.scores for layer in layers if layer.tail.scores is not None]
        return cls(ends, valid, positions.clamp(min=0).int(), torch.stack(scores).flatten(0, 1))

    def of_heads(self, columns: torch.Tensor) -> torch.Tensor:
        """Returns what all heads of all layers have in columns ``[batch, n]``, in the shape of the scores."""
        n_layers = len(self.scores) // len(columns)
        return columns.repeat(n_layers, 1).unsqueeze(1).expand(self.scores.shape)

    def lack_scores(self) -> torch.Tensor:
        """Returns whether a token has no score, bool, without dimensions."""
        return (self.scores.isnan() & self.of_heads(self.valid)).any()
