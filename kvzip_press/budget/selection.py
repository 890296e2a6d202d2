"""Turns scores and counts into keep masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvzip_press.budget.allocation import allocate, standing_pairs
from kvzip_press.budget.amount import LayerRatios
from kvzip_press.budget.candidates import Counts, Masks
from kvzip_press.budget.joined_layers import by_head
from kvzip_press.budget.scores import Scores


def select(
    scores: Scores,
    valid: torch.Tensor,
    *,
    among: Masks | None = None,
    of_all: bool = False,
    held: Mapping[int, torch.Tensor] | None = None,
) -> dict[int, torch.Tensor]:
    """Selects the pairs that stay.

    Args:
        scores: Scores with their policy.
        valid: ``[batch, span]``, bool, False at padding, which is never kept.
        among: ``layer_idx -> [batch, heads, span]``, bool: the pairs that are left to choose from, as an earlier
            selection returned them; None for all.
        of_all: Whether a ratio applies to all pairs, rather than to those that are left.
        held: Pairs of earlier turns that count towards a budget in tokens, see
            :func:`kvzip_press.budget.allocation.allocate`.

    Returns:
        ``layer_idx -> [batch, num_key_value_heads, span]``, bool: every protected pair, and in each head the best
        unprotected ones, exactly as many as :func:`kvzip_press.budget.allocation.allocate` says.
    """
    counts: Counts = allocate(scores, valid, among=among, of_all=of_all, held=held)

    def of_heads(values: torch.Tensor, standing: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor]:
        protected = scores.protected.to(standing.device)
        kept = top_mask(values.masked_fill(~standing, -torch.inf), counts, ~protected)
        return (kept | (standing & protected.unsqueeze(1)),)

    standing = standing_pairs(scores, valid, among)
    counts = {i: kept.to(standing[i].device) for i, kept in counts.items()}
    return by_head(of_heads, scores.layers, standing, counts)[0]


def top_mask(values: torch.Tensor, counts: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """Returns a mask of the ``counts`` largest eligible entries of each head; ties go to the lower position.

    Args:
        values: ``[batch, heads, span]``, no NaN, -inf where nothing can be kept.
        counts: ``[batch, heads]``, int64, at most the number of entries of the head that can be kept.
        eligible: ``[batch, span]``, bool.

    Returns:
        ``[batch, heads, span]``, bool.
    """
    candidates = values.masked_fill(~eligible.unsqueeze(1), -torch.inf)
    order = candidates.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return ranks < counts.to(ranks.device).unsqueeze(-1)


def why_nothing_went(scores: Scores, keep: Mapping[int, torch.Tensor], valid: torch.Tensor) -> str:
    """Returns why an eviction that was asked for a fraction removed no pair; empty if some went, or none had to.

    A budget in tokens asks for nothing of a context that is shorter.

    Args:
        scores: What the eviction was asked for.
        keep: ``layer_idx -> [batch, num_key_value_heads, span]``, bool, as selected.
        valid: ``[batch, span]``, bool, False at padding.
    """
    amount = scores.policy.amount
    ratio = max(amount.values(), default=0.0) if isinstance(amount, LayerRatios) else amount.compression_ratio
    went = ratio == 0 or any(bool((valid.to(kept.device)[:, None] & ~kept).any()) for kept in keep.values())
    if went:
        return ""
    if not bool((valid & ~scores.protected).any()):
        return "it protects every token of so short a context"
    if scores.is_decided:
        return "it decided to keep every pair: the ends that it keeps of each head, say, reach over so short a context"
    return "its budget, rounded and with its floors, holds every pair of so short a context"
