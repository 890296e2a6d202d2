"""From the rows that a kvpress press scored or kept to the core's Scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvzip_press.budget.allocation import check_compression_ratio
from kvzip_press.budget.scores import Scores
from kvzip_press.presses.kvpress_adapter.importing import kvpress

if TYPE_CHECKING:
    from kvzip_press.prefilling.whole import Prefill

Rows = Mapping[int, list[torch.Tensor]]


@dataclass(frozen=True)
class HeadScores(Scores):
    """Scores of which every head keeps as many pairs as kvpress would, at any ratio.

    Attributes:
        lengths: Tokens of each row.
    """

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, prefill: Prefill, rows: Rows, compression_ratio: float, *, any_ratio: bool) -> Scores:
        """The scores of a prefill; with a fixed budget where they are good for one ratio only."""
        layers, protected = _spread(prefill, rows), torch.zeros_like(prefill.valid)
        lengths = tuple(prefill.valid.sum(dim=-1).tolist())
        scores = cls(layers, protected, compression_ratio, "head", lengths=lengths).with_policy(None, None)
        if any_ratio:
            return scores
        return Scores(layers, protected, compression_ratio, "head", counts=scores.counts)

    @property
    def is_decided(self) -> bool:
        """Never: the counts follow any ratio."""
        return False

    def with_policy(self, compression_ratio: float | None, allocation: str | None) -> Scores:
        """The same scores at another ratio, or spent by the core over a layer or all layers."""
        ratio = check_compression_ratio(self.compression_ratio if compression_ratio is None else compression_ratio)
        allocation = self.allocation if allocation is None else allocation
        counts = None
        if allocation == "head":
            utils = kvpress().utils
            n_kept = torch.tensor([utils.compute_n_kept(length, ratio) for length in self.lengths])
            counts = {
                layer_idx: n_kept[:, None].expand(-1, scores.shape[1]).to(scores.device)
                for layer_idx, scores in self.layers.items()
            }
        return replace(self, compression_ratio=ratio, allocation=allocation, counts=counts)


def keep_scores(prefill: Prefill, rows: Rows, compression_ratio: float) -> Scores:
    """A decision that was taken: 1 for pairs that stay, 0 for the others, and just as many to keep.

    Args:
        prefill: The prefill.
        rows: ``layer_idx -> [row] -> [num_key_value_heads, n]``, bool.
        compression_ratio: The press's own; NaN for what it comes to.
    """
    layers = _spread(prefill, rows)
    counts = {layer_idx: kept.sum(dim=-1).long() for layer_idx, kept in layers.items()}
    if math.isnan(compression_ratio):
        pairs = sum(row.numel() for layer in rows.values() for row in layer)
        compression_ratio = 1 - sum(int(count.sum()) for count in counts.values()) / pairs
    return Scores(layers, torch.zeros_like(prefill.valid), compression_ratio, "head", counts=counts)


def _spread(prefill: Prefill, rows: Rows) -> dict[int, torch.Tensor]:
    """``[batch, num_key_value_heads, span]``, fp32, each row at its own tokens and 0 at its padding."""
    layers = prefill.blank_scores()
    for layer_idx, layer in layers.items():
        for row, valid in enumerate(prefill.valid):
            layer[row, :, valid.to(layer.device)] = rows[layer_idx][row].to(layer)
    return layers
