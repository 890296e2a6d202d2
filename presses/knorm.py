"""Knorm (https://arxiv.org/abs/2406.11430): pairs whose keys are short are kept, ``S = -||k||``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.budget.allocators import AllocationLike, PerHead, SkippingLayers
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress


@dataclass(frozen=True)
class KnormPress(AllocatingPress):
    """Keeps the pairs whose keys have the smallest norm; nothing is observed, and nothing is protected.

    A pair's score is minus the Euclidean norm of its key after RoPE, in fp32. The authors leave the first one or two
    layers whole in every experiment. ``skip_layers=(0, 1)`` does that within the budget: the other layers pay for it,
    so that the whole keeps what was asked for. Budgets are per KV head (other code may count query heads).

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: "head" (the paper: every head keeps as many), or another.
        budget: Tokens' worth of pairs to keep, instead of a ratio; this and the other fields of the policy are
            explained in :class:`kvzip_press.press.AllocatingPress`.
        skip_layers: Layers that keep every pair, by index; only with allocation "head" and without layer ratios.

    Raises:
        InvalidArgumentError: A value is out of range, or layers are skipped under another allocation.
    """

    allocation: AllocationLike = "head"
    skip_layers: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_layers", SkippingLayers(layers=self.skip_layers).layers)
        super().__post_init__()

    @property
    def policy(self) -> Policy:
        """How much is kept and how pairs compete for it, according to the fields."""
        policy = super().policy
        if not self.skip_layers:
            return policy
        if type(policy.allocation) is not PerHead:
            raise InvalidArgumentError(
                f'expected skip_layers with allocation "head", got it with {self.allocation!r:.80}: give '
                "allocation=SkippingLayers(...) or layer_ratios instead"
            )
        floors: dict[str, Any] = {"min_kept_per_head": self.min_kept_per_head, "safeguard": self.safeguard}
        return Policy(policy.amount, SkippingLayers(layers=self.skip_layers, **floors))

    def score(self, prefill: Prefill) -> Scores:
        """Returns minus the norm of each key."""
        layers = {
            layer_idx: -torch.linalg.vector_norm(prefill.pairs(layer_idx)[0].float(), dim=-1)
            for layer_idx in prefill.blank_scores()
        }
        valid = prefill.valid[:, None]
        layers = {i: values.masked_fill(~valid.to(values.device), 0) for i, values in layers.items()}
        return Scores(layers, torch.zeros_like(prefill.valid), self.policy)
