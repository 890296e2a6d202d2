"""From scores and counts to keep masks."""

from __future__ import annotations

import torch

from kvzip_press.budget import Counts, allocate
from kvzip_press.scores import Scores


def select(scores: Scores, valid: torch.Tensor) -> dict[int, torch.Tensor]:
    """Which pairs stay.

    Args:
        scores: Scores with their policy.
        valid: ``[batch, span]``, bool, False at padding, which is never kept.

    Returns:
        ``layer_idx -> [batch, num_key_value_heads, span]``, bool: every protected pair, and in each head the best
        unprotected ones, exactly as many as :func:`kvzip_press.budget.allocate` says.
    """
    counts: Counts = allocate(scores, valid)
    keep = {}
    for layer_idx, values in scores.layers.items():
        on = values.device
        keep[layer_idx] = top_mask(values, counts[layer_idx], (valid & ~scores.protected).to(on)) | (
            valid & scores.protected
        ).to(on).unsqueeze(1)
    return keep


def top_mask(values: torch.Tensor, counts: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """The ``counts`` largest eligible entries of each head; equal entries go by lower position.

    Args:
        values: ``[batch, heads, span]``, finite.
        counts: ``[batch, heads]``, int64, at most the eligible positions of the row.
        eligible: ``[batch, span]``, bool.
    """
    candidates = values.masked_fill(~eligible.unsqueeze(1), -torch.inf)
    order = candidates.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return ranks < counts.to(ranks.device).unsqueeze(-1)
