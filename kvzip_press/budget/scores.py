"""What a scorer hands on: the importance of every key/value pair, and how the press would spend a budget on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvzip_press.budget.policy import SAFEGUARD, LayerRatios, check_amount, check_policy
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Scores:
    """Importance of the pairs of one span of tokens (the whole context, or a later turn).

    Attributes:
        layers: ``layer_idx -> [batch, num_key_value_heads, span]``, fp32, higher is more important. Only layers that
            can be compressed appear. What stands at protected or padded positions does not matter.
        protected: ``[batch, span]``, bool: positions that no head may lose (chat-template prefix, sink, window).
        compression_ratio: The fraction to remove that the press was made with.
        allocation: How the press spends its budget, see :data:`kvzip_press.budget.allocation.ALLOCATIONS`.
        protected_count: Whether protected pairs count inside the budget, as most papers have it (KVzip does not); a
            mask ``[batch, span]``, bool, where those of some positions do (Fast KVzip: the window, not the prefix).
        counts: ``layer_idx -> [batch, num_key_value_heads]``, int64: unprotected pairs to keep, for a press that
            decides its budget itself; None for all others.
        budget: Tokens' worth of pairs to keep instead of a ratio, see :class:`kvzip_press.press.Press`.
        layer_ratios: A ratio for each layer instead of one for all.
        safeguard: The part of its equal share that "adakv" keeps of every head.
        min_kept_per_head: Unprotected pairs that every head keeps, as far as the budget goes.
        carried: Whether the pairs that stay carry their scores, for evictions while the model writes.

    Raises:
        InvalidArgumentError: Scores that are not finite or not of one span, a policy out of range, or layer ratios for
            other layers than were scored.
    """

    layers: Mapping[int, torch.Tensor]
    protected: torch.Tensor
    compression_ratio: float
    allocation: str = "global"
    protected_count: bool | torch.Tensor = False
    counts: Mapping[int, torch.Tensor] | None = None
    budget: int | None = None
    layer_ratios: Mapping[int, float] | None = None
    safeguard: float = SAFEGUARD
    min_kept_per_head: int = 0
    carried: bool = False

    def __post_init__(self) -> None:
        if self.counts is None:
            self._check_policy()
        batch, span = self.protected.shape
        for layer_idx, values in self.layers.items():
            if values.dim() != 3 or (values.shape[0], values.shape[2]) != (batch, span):
                raise InvalidArgumentError(
                    f"expected scores [batch={batch}, heads, span={span}] for layer {layer_idx}, "
                    f"got {tuple(values.shape)}"
                )
            if not bool(torch.isfinite(values).all()):
                raise InvalidArgumentError(f"expected finite scores, got NaN or infinity in layer {layer_idx}")

    @property
    def charged(self) -> torch.Tensor:
        """``[batch, span]``, bool: the protected positions whose pairs count inside the budget."""
        return self.protected & self.protected_count

    @property
    def is_decided(self) -> bool:
        """Whether the press spent its budget itself, so that no other ratio can be asked of these scores."""
        return self.counts is not None

    def ratio_of(self, layer_idx: int) -> float:
        """The compression ratio of a layer."""
        return self.compression_ratio if self.layer_ratios is None else self.layer_ratios[layer_idx]

    def with_policy(self, compression_ratio: float | None, allocation: str | None) -> Scores:
        """The same scores at another ratio, instead of their own, their budget or their layer ratios. None keeps these.

        Raises:
            InvalidArgumentError: The press fixed its own budget, and another one is asked for.
        """
        amount: dict[str, Any] = {"compression_ratio": compression_ratio, "budget": None, "layer_ratios": None}
        return self._asked(amount if compression_ratio is not None else {}, allocation)

    def with_budget(self, budget: int, allocation: str | None = None) -> Scores:
        """The same scores under a budget in tokens, instead of any other.

        Raises:
            InvalidArgumentError: The press fixed its own budget, or the budget is not an int of at least 1.
        """
        return self._asked({"compression_ratio": 0.0, "budget": budget, "layer_ratios": None}, allocation)

    def asked_for(self, compression_ratio: float | None, allocation: str | None, budget: int | None) -> Scores:
        """The same scores under what an eviction asks for; None for what it leaves to them.

        Raises:
            InvalidArgumentError: A ratio and a budget, or what the two methods above refuse.
        """
        if compression_ratio is not None and budget is not None:
            raise InvalidArgumentError(
                f"expected a compression_ratio or a budget, got {compression_ratio!r} and {budget!r}"
            )
        if budget is None and compression_ratio is None:
            budget = self.budget
        if budget is not None:
            return self.with_budget(budget, allocation)
        # Scores that work out counts of their own at a ratio know nothing of budgets
        return (self if self.budget is None else replace(self, budget=None)).with_policy(compression_ratio, allocation)

    def _asked(self, amount: dict[str, Any], allocation: str | None) -> Scores:
        asked = {**amount, **({} if allocation is None else {"allocation": allocation})}
        if all(getattr(self, name) == value for name, value in asked.items()):
            return self
        if self.is_decided:
            budget = asked.get("budget")
            got = asked.get("compression_ratio", self.compression_ratio) if budget is None else f"budget={budget!r}"
            raise InvalidArgumentError(
                f"this press decides its own budget: expected its compression_ratio={self.compression_ratio}, "
                f"got {got} with allocation={asked.get('allocation', self.allocation)!r}"
            )
        check_amount(asked.get("compression_ratio"), asked.get("budget"))
        return replace(self, counts=None, **asked)

    def _check_policy(self) -> None:
        check_policy(
            compression_ratio=self.compression_ratio,
            budget=self.budget,
            layer_ratios=self.layer_ratios,
            allocation=self.allocation,
            safeguard=self.safeguard,
            min_kept_per_head=self.min_kept_per_head,
        )
        if self.layer_ratios is None:
            return
        object.__setattr__(self, "layer_ratios", LayerRatios(self.layer_ratios))
        if set(self.layer_ratios) != set(self.layers):
            raise InvalidArgumentError(
                f"expected layer_ratios for layers {sorted(self.layers)}, got them for {sorted(self.layer_ratios)}"
            )
