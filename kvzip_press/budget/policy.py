"""What is asked of a budget: how much is kept, and how pairs compete for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvzip_press.budget.allocators import SAFEGUARD, Allocation, Decided, Global, allocation_of
from kvzip_press.budget.amount import Amount, LayerRatios, Ratio, amount_of
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Policy:
    """An amount and an allocation, a value.

    Args:
        amount: How much is kept.
        allocation: How pairs compete.

    Raises:
        InvalidArgumentError: A ratio for each layer, and an allocation under which layers compete.
    """

    amount: Amount = field(default_factory=Ratio)
    allocation: Allocation = field(default_factory=Global)

    def __post_init__(self) -> None:
        if not isinstance(self.amount, Amount) or not isinstance(self.allocation, Allocation):
            raise InvalidArgumentError(
                f"expected an Amount and an Allocation (Policy.of makes them), got {self.amount!r} and "
                f"{self.allocation!r}"
            )
        if isinstance(self.amount, LayerRatios) and isinstance(self.allocation, Global):
            raise InvalidArgumentError(
                'expected allocation "layer", "head" or "adakv" with layer_ratios, got "global", where layers compete'
            )

    @classmethod
    def of(
        cls,
        compression_ratio: float | None = None,
        allocation: str | Allocation = "global",
        *,
        budget: int | None = None,
        layer_ratios: Mapping[int, float] | Sequence[float] | None = None,
        safeguard: float = SAFEGUARD,
        min_kept_per_head: int = 0,
    ) -> Policy:
        """A policy from what presses have as fields.

        Args:
            compression_ratio: Fraction of pairs removed, in [0, 1).
            allocation: "global", "layer", "head", "adakv", or an :class:`kvzip_press.budget.allocators.Allocation`.
            budget: Instead of a ratio: tokens' worth of pairs kept.
            layer_ratios: Instead of one ratio: each layer's own.
            safeguard: Of "adakv".
            min_kept_per_head: Unprotected pairs that every head keeps.

        Raises:
            InvalidArgumentError: A value out of range, or values that contradict each other.
        """
        allocation = allocation_of(allocation, min_kept_per_head=min_kept_per_head, safeguard=safeguard)
        return cls(amount_of(compression_ratio, budget, layer_ratios), allocation)

    @property
    def compression_ratio(self) -> float:
        """The fraction removed that the amount names; 0.0 where it names none."""
        return self.amount.compression_ratio

    def asked(
        self,
        compression_ratio: float | None = None,
        allocation: str | Allocation | None = None,
        budget: int | None = None,
    ) -> Policy:
        """The policy under what an eviction asks for; None for what it leaves as it is.

        Raises:
            InvalidArgumentError: A value out of range, a ratio and a budget, or anything else than what a press has
                decided by itself.
        """
        if compression_ratio is not None and budget is not None:
            raise InvalidArgumentError(
                f"expected a compression_ratio or a budget, got {compression_ratio!r} and {budget!r}"
            )
        policy = self
        if compression_ratio is not None or budget is not None:
            policy = replace(policy, amount=amount_of(compression_ratio, budget))
        if allocation is not None:
            policy = replace(policy, allocation=self._allocation(allocation))
        if policy != self and isinstance(self.allocation, Decided):
            got = f"budget={budget!r}" if budget is not None else f"{policy.compression_ratio}"
            also = "" if allocation is None else f" with allocation={allocation!r}"
            raise InvalidArgumentError(
                f"this press decides its own budget: expected its compression_ratio={self.compression_ratio}, "
                f"got {got}{also}"
            )
        return policy

    def _allocation(self, given: str | Allocation) -> Allocation:
        """The one of a short name keeps the floors that there are."""
        if isinstance(given, Allocation):
            return given
        own = self.allocation
        return allocation_of(given, min_kept_per_head=own.min_kept_per_head, safeguard=own.safeguard)
