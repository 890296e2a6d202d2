"""KeyDiff (https://arxiv.org/abs/2504.15364): pairs whose keys are unlike the mean key are kept.

``S = -cos(k, mean over the context of k / ||k||)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kvzip_press.budget.allocators import AllocationLike
from kvzip_press.budget.scores import Scores
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress


@dataclass(frozen=True)
class KeyDiffPress(AllocatingPress):
    """Keeps the pairs whose keys differ most from the mean of all normalised keys of their head.

    Keys are taken after RoPE, the mean over the tokens of the span, in fp32; nothing is observed, and nothing is
    protected. The paper reads the context in blocks: so does :func:`kvzip_press.compress_in_chunks`, where each chunk
    has its own mean. Budgets are per KV head (other code may count query heads).

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: "head" (the paper: every head keeps as many), or another.
        budget: Tokens' worth of pairs to keep, instead of a ratio; this and the other fields of the policy are
            explained in :class:`kvzip_press.press.AllocatingPress`.
    """

    allocation: AllocationLike = "head"

    def score(self, prefill: Prefill) -> Scores:
        """Returns minus the cosine of each key and the mean of the normalised keys of its row."""
        layers = {}
        for layer_idx in prefill.blank_scores():
            directions = functional.normalize(prefill.pairs(layer_idx)[0].float(), dim=-1)
            valid = prefill.valid[:, None, :, None].to(directions.device)
            directions = directions.masked_fill(~valid, 0)  # what stands at padding may be anything
            mean = directions.sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True)
            layers[layer_idx] = -functional.cosine_similarity(directions, mean, dim=-1)
        return Scores(layers, torch.zeros_like(prefill.valid), self.policy)
