"""From a query to the pairs that it reads: the groups of a layer's pairs, as the kernel that ranks them takes them."""

from __future__ import annotations

import torch

from kvzip_press.cache.codecs.held import Held
from kvzip_press.cache.recall.groups import MARKS, ORDER, SIZES
from kvzip_press.cache.recall.policy import Recall
from kvzip_press.kernels.recall_ranking import recall_ranking


def listed(
    recall: Recall,
    groups: Held,
    query: torch.Tensor,
    num_heads: int,
    *,
    row_index: torch.Tensor | None = None,
    scaling: float | None = None,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the pairs that one token of each row reads (:func:`kvzip_press.kernels.recall_ranking.recall_ranking`).

    All shapes are known beforehand and nothing is read from the device, so a captured graph ranks anew in each replay.

    Args:
        recall: How groups are ranked.
        groups: The groups of all segments, as :mod:`kvzip_press.cache.recall.groups` holds them.
        query: ``[batch, num_attention_heads, 1, head_dim]``.
        num_heads: Number of key-value heads.
        row_index: Batch row -> packed row, int64 ``[batch]``; None if they are the same.
        scaling: Factor of the logits; None means ``head_dim ** -0.5``.
        width: Pairs that the longest list has: those of the longest segment, at most the budget.

    Returns:
        The listed pairs, int32 ``[at least all]``, and where each list begins, int32 ``[lists + 1]``, in the order of
        (batch row, key-value head) or, if each query head has its own, (batch row, query head).
    """
    return recall_ranking(
        query[:, :, 0],
        groups.tables[MARKS],
        groups.tables[SIZES],
        groups.columns[ORDER],
        groups.cu_seqlens,
        num_key_value_heads=num_heads,
        budget=width,
        row_index=row_index,
        per_query_head=recall.per_query_head,
        scaling=scaling,
    )
