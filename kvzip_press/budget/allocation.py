"""Turns a budget into integers: how many unprotected pairs each (row, layer, head) keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvzip_press.budget.allocators import Allocation, Decided
from kvzip_press.budget.candidates import Candidates, Counts, Masks, of_batch
from kvzip_press.budget.joined_layers import by_head
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
    """Decides how many pairs each head keeps, by the budget of ``scores``.

    A pool (all layers, one layer or one head) of n pairs keeps exactly ``round((1 - compression_ratio) * n)`` of them,
    or, with a budget in tokens, ``budget`` pairs for each of its heads less those in ``held``. Ties between equal
    scores go to the lower position, then the lower layer, then the lower head. Each batch row has its own budget over
    its own tokens. Every row keeps at least one pair per layer.

    Pools may be budgets of layers or heads that a rule fixes (a pyramid, a table), and some rules keep whole pages, or
    what a threshold says: see the classes of :mod:`kvzip_press.budget.allocators`.

    Floors are part of the budget. Heads fill them in turns: first each takes its best pair, then each its second best,
    and within a turn the better pairs come first. The floors are ``min_kept_per_head`` pairs of every head and, for
    "adakv", a fraction ``safeguard`` of the budget, so that each head gets that fraction of its equal share, rounded
    down. A budget that is too small for the floors runs out during these turns. A larger budget keeps a superset, under
    every allocation.

    Args:
        scores: Scores with their policy.
        valid: ``[batch, span]``, bool, False at padding.
        among: ``layer_idx -> [batch, heads, span]``, bool: the pairs that are left to choose from; None for all.
        of_all: Whether a ratio applies to all pairs, rather than to those that are left.
        held: ``layer_idx -> [batch, heads]``: pairs of earlier turns that count towards a budget in tokens; None for
            none.

    Returns:
        ``layer_idx -> [batch, num_key_value_heads]``, int64: the number of pairs to keep, not counting protected ones.

    Raises:
        InvalidArgumentError: ``among`` is given, but the press decided its counts over all pairs.
    """
    if among is not None and scores.is_decided:
        raise InvalidArgumentError("expected scores that follow a budget, got counts that were decided over all pairs")
    standing = standing_pairs(scores, valid, among)
    base = standing_pairs(scores, valid, None) if of_all else standing
    candidates = Candidates.of_rows(
        scores.layers, standing, base, scores.protected, scores.charged, held or {}, scores.attention
    )
    allocation = scores.policy.allocation
    if type(allocation).counts in (Allocation.counts, Decided.counts):
        return allocation.counts_of_rows(candidates, scores.policy.amount)
    rows = [allocation.counts(row, scores.policy.amount) for row in candidates]  # someone else's code
    for row, counts in zip(candidates, rows, strict=True):
        _check_counts(allocation, row, counts)
    return of_batch(rows, scores.layers)


def _check_counts(allocation: Allocation, row: Candidates, counts: Counts) -> None:
    """Raises InvalidArgumentError unless every head of a row has a count of pairs that it can keep."""
    for layer_idx, free in row.free.items():
        of_layer = counts.get(layer_idx) if isinstance(counts, dict) else None
        if not isinstance(of_layer, torch.Tensor) or of_layer.dtype != torch.int64 or of_layer.shape != (len(free),):
            raise InvalidArgumentError(
                f"expected {type(allocation).__name__}.counts to return int64 [{len(free)}] for layer {layer_idx}, got "
                f"{of_layer!r:.80}"
            )
        if not all(0 <= count <= available for count, available in zip(of_layer.tolist(), free, strict=True)):
            raise InvalidArgumentError(
                f"expected {type(allocation).__name__}.counts of 0 to {list(free)} in layer {layer_idx}, the pairs "
                f"that compete there, got {of_layer.tolist()}"
            )


def standing_pairs(scores: Scores, valid: torch.Tensor, among: Masks | None) -> dict[int, torch.Tensor]:
    """Returns ``layer_idx -> [batch, heads, span]``, bool, on the scores' devices: the pairs that can be kept."""
    if among is None:
        return {i: valid.to(values.device).unsqueeze(1).expand_as(values) for i, values in scores.layers.items()}
    left = {i: among[i].to(values.device) for i, values in scores.layers.items()}
    return by_head(lambda mask: (mask & valid.to(mask.device).unsqueeze(1),), left)[0]
