"""TOVA (https://arxiv.org/abs/2401.06104): pairs are kept that the last token of the context attends to."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip_press.budget.allocators import AllocationLike
from kvzip_press.budget.scores import Scores
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress


@dataclass(frozen=True)
class TOVAPress(AllocatingPress):
    """Scores a pair with the attention that the last token of the context pays to it, averaged over all query heads.

    So all heads of a layer keep the same tokens. The last token itself is protected, inside the budget, as in kvpress;
    the paper lets it compete. It is the model's own attention, scaling and softcap included, normalised over the pairs
    of the span that is read: of a later turn or a chunk, over its own pairs. Budgets are per KV head (other code may
    count query heads).

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: "head" (the paper: every layer keeps as many tokens), or another.
        budget: Tokens' worth of pairs to keep, instead of a ratio; this and the other fields of the policy are
            explained in :class:`kvzip_press.press.AllocatingPress`.
    """

    allocation: AllocationLike = "head"

    def score(self, prefill: Prefill) -> Scores:
        """Returns the last token's attention; 1, the most there is, for the last token itself."""
        layers, last = prefill.blank_scores(), prefill.last_tokens(1)
        for layer_idx, scores in layers.items():
            for row, heads, attention in prefill.last_token().attention(layer_idx, prefill.pairs(layer_idx)[0]):
                valid = prefill.valid[row].to(scores.device)
                scores[row, heads, valid] = attention[:, :, 0].mean(dim=1)
            scores.copy_(scores.mean(dim=1, keepdim=True).expand_as(scores))
            scores.masked_fill_(last[:, None].to(scores.device), 1)
        uniform = prefill.uniform_attention()
        return Scores(layers, last, self.policy, protected_count=True, uniform=uniform)
