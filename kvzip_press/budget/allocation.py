"""From a budget to integers: how many unprotected pairs each (row, layer, head) keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvzip_press.budget.candidates import Candidates, Counts, Masks
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError


def allocate(
    scores: Scores,
    valid: torch.Tensor,
    *,
    among: Masks | None = None,
    of_all: bool = False,
    held: Mapping[int, torch.Tensor] | None = None,
) -> Counts:
    """Spends the budget of ``scores``.

    A pool (all layers, one layer or one head) of n pairs keeps ``round((1 - compression_ratio) * n)`` of them, or
    ``budget`` for each of its heads where a budget in tokens was given (less what ``held`` says), exactly, whatever the
    ties: those of equal score go by lower position, then lower layer, then lower head. Each batch row has its own
    budget over its own tokens. At least one pair a layer stays in every row.

    Floors are inside the budget. Heads fill them in turns, each with its best pair, then each with its second best, and
    in a turn the better pairs come first: ``min_kept_per_head`` of every head, and for "adakv" ``safeguard`` of the
    budget, so that each head has that part of its equal share, rounded down. When the budget is too small for the
    floors it ends within the turns. A larger budget keeps a superset, under every allocation.

    Args:
        scores: Scores with their policy.
        valid: ``[batch, span]``, bool, False at padding.
        among: ``layer_idx -> [batch, heads, span]``, bool: the pairs that are left to choose from; None for all.
        of_all: Whether a ratio is of all pairs and not of those that are left.
        held: ``layer_idx -> [batch, heads]``: pairs of earlier turns that a budget in tokens has to hold too.

    Returns:
        ``layer_idx -> [batch, num_key_value_heads]``, int64: pairs to keep, protected ones not counted.

    Raises:
        InvalidArgumentError: Pairs are left out, and the press had decided its counts over all of them.
    """
    if among is not None and scores.is_decided:
        raise InvalidArgumentError("expected scores that follow a budget, got counts that were decided over all pairs")
    standing = standing_pairs(scores, valid, among)
    base = standing_pairs(scores, valid, None) if of_all else standing
    protected, charged = scores.protected, scores.charged
    rows = [
        scores.policy.allocation.counts(
            Candidates.of_row(row, scores.layers, standing, base, protected, charged, held or {}), scores.policy.amount
        )
        for row in range(valid.shape[0])
    ]
    return {layer_idx: torch.stack([row[layer_idx] for row in rows]) for layer_idx in scores.layers}


def standing_pairs(scores: Scores, valid: torch.Tensor, among: Masks | None) -> dict[int, torch.Tensor]:
    """``layer_idx -> [batch, heads, span]``, bool, on the scores' devices: the pairs that can be kept at all."""
    every = {
        layer_idx: valid.to(values.device).unsqueeze(1).expand_as(values) for layer_idx, values in scores.layers.items()
    }
    return every if among is None else {i: mask & among[i].to(mask.device) for i, mask in every.items()}
