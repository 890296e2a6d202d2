"""Turns the rows that a kvpress press scored or kept into the core's Scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvzip_press.budget.allocators import Decided, PerHead
from kvzip_press.budget.amount import Amount, Ratio
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.presses.kvpress_adapter.importing import kvpress

if TYPE_CHECKING:
    from kvzip_press.prefilling.whole import Prefill

Rows = Mapping[int, list[torch.Tensor]]


@dataclass(frozen=True)
class KvpressPerHead(PerHead):
    """Every head keeps as many pairs as kvpress would keep, at any ratio: kvpress truncates where the core rounds."""

    def asked(self, amount: Amount, layers: Sequence[int], n_pairs: int, n_heads: int, n_held: int = 0) -> int:
        """Returns kvpress's number of pairs for a head if a ratio is asked for, else the core's."""
        if isinstance(amount, Ratio):
            return _n_kept(n_pairs, amount.compression_ratio)
        return super().asked(amount, layers, n_pairs, n_heads, n_held)


@functools.cache
def _n_kept(n_pairs: int, compression_ratio: float) -> int:
    """Returns kvpress's number of pairs; remembered, since its heads are many and of few lengths."""
    return int(kvpress().utils.compute_n_kept(n_pairs, compression_ratio))


def ratio_scores(prefill: Prefill, rows: Rows, compression_ratio: float, *, any_ratio: bool) -> Scores:
    """Returns the scores of a press that only scores.

    Args:
        prefill: The prefill.
        rows: ``layer_idx -> [row] -> [num_key_value_heads, n]``, fp32.
        compression_ratio: The press's own ratio.
        any_ratio: Whether the scores are valid for every ratio, or only for the press's own.
    """
    layers, amount, protected = _spread(prefill, rows), Ratio(compression_ratio), torch.zeros_like(prefill.valid)
    if not any_ratio:
        lengths = prefill.valid.sum(dim=-1).tolist()
        n_kept = torch.tensor([_n_kept(length, compression_ratio) for length in lengths])
        counts = {i: n_kept[:, None].expand(-1, values.shape[1]).to(values.device) for i, values in layers.items()}
        return Scores(layers, protected, Policy(amount, Decided(per_head=counts)))
    return Scores(layers, protected, Policy(amount, KvpressPerHead()))


def keep_scores(prefill: Prefill, rows: Rows, compression_ratio: float) -> Scores:
    """Returns scores for a decision that was made: 1 for pairs that stay, 0 for the others, and counts to match.

    Args:
        prefill: The prefill.
        rows: ``layer_idx -> [row] -> [num_key_value_heads, n]``, bool.
        compression_ratio: The press's own ratio; NaN to use the fraction that was removed.
    """
    layers = _spread(prefill, rows)
    counts = {layer_idx: kept.sum(dim=-1).long() for layer_idx, kept in layers.items()}
    if math.isnan(compression_ratio):
        pairs = sum(row.numel() for layer in rows.values() for row in layer)
        compression_ratio = 1 - sum(int(count.sum()) for count in counts.values()) / pairs
    return Scores(layers, torch.zeros_like(prefill.valid), Policy(Ratio(compression_ratio), Decided(per_head=counts)))


def _spread(prefill: Prefill, rows: Rows) -> dict[int, torch.Tensor]:
    """Returns rows as ``[batch, num_key_value_heads, span]``, fp32, each at its own tokens, with 0 at its padding."""
    layers = prefill.blank_scores()
    for layer_idx, layer in layers.items():
        for row, valid in enumerate(prefill.valid):
            layer[row, :, valid.to(layer.device)] = rows[layer_idx][row].to(layer)
    return layers
