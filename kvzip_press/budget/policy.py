"""The policy of a press: how much is kept, and how pairs compete for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvzip_press.budget.allocators import SAFEGUARD, Allocation, AllocationLike, Decided, Global, allocation_of
from kvzip_press.budget.amount import Amount, LayerRatios, Ratio, amount_of
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Policy:
    """An amount and an allocation, as a frozen value.

    Args:
        amount: How much is kept.
        allocation: How pairs compete.

    Raises:
        InvalidArgumentError: The values are not an Amount and an Allocation, or the amount has a ratio for each layer
            and layers compete under the allocation, or there is an amount and the allocation is one whose kept
            fraction is an outcome.
    """

    amount: Amount = field(default_factory=Ratio)
    allocation: Allocation = field(default_factory=Global)

    def __post_init__(self) -> None:
        if not isinstance(self.amount, Amount) or not isinstance(self.allocation, Allocation):
            raise InvalidArgumentError(
                f"expected an Amount and an Allocation (Policy.of makes them), got {self.amount!r} and "
                f"{self.allocation!r}"
            )
        name = self.allocation.name or type(self.allocation).__name__
        if isinstance(self.amount, LayerRatios) and self.allocation.layers_compete:
            raise InvalidArgumentError(
                f'expected allocation "layer", "head" or "adakv" with layer_ratios, got "{name}", where layers compete'
            )
        if self.allocation.is_outcome and self.amount != Ratio(0.0):
            raise InvalidArgumentError(
                f'expected no ratio and no budget with allocation "{name}", under which the kept fraction is an '
                f"outcome, got {self.amount!r}"
            )

    @classmethod
    def of(
        cls,
        compression_ratio: float | None = None,
        allocation: AllocationLike = "global",
        *,
        budget: int | None = None,
        layer_ratios: Mapping[int, float] | Sequence[float] | None = None,
        safeguard: float = SAFEGUARD,
        min_kept_per_head: int = 0,
    ) -> Policy:
        """Makes a policy from the values that presses have as fields.

        Args:
            compression_ratio: Fraction of pairs removed, in [0, 1).
            allocation: A name of :data:`kvzip_press.budget.allocators.ALLOCATIONS`, an
                :class:`kvzip_press.budget.allocators.Allocation`, or a mapping with the name and arguments of one.
            budget: Tokens' worth of pairs to keep, instead of a ratio.
            layer_ratios: A ratio for each layer, instead of one for all.
            safeguard: AdaKV's alpha, for "adakv", in [0, 1].
            min_kept_per_head: Number of unprotected pairs that every head keeps at least.

        Raises:
            InvalidArgumentError: A value is out of range, or values contradict each other.
        """
        allocation = allocation_of(allocation, min_kept_per_head=min_kept_per_head, safeguard=safeguard)
        return cls(amount_of(compression_ratio, budget, layer_ratios), allocation)

    @property
    def compression_ratio(self) -> float:
        """The fraction removed, if the amount names one; 0.0 otherwise."""
        return self.amount.compression_ratio

    def asked(
        self,
        compression_ratio: float | None = None,
        allocation: AllocationLike | None = None,
        budget: int | None = None,
    ) -> Policy:
        """Returns the policy with the values that an eviction asks for; None leaves a value as it is.

        Raises:
            InvalidArgumentError: A value is out of range, both a ratio and a budget are given, or the press decided its
                own counts and something else is asked for.
        """
        if compression_ratio is not None and budget is not None:
            raise InvalidArgumentError(
                f"expected a compression_ratio or a budget, got {compression_ratio!r} and {budget!r}"
            )
        amount = self.amount
        if compression_ratio is not None or budget is not None:
            amount = amount_of(compression_ratio, budget)
        policy = Policy(amount, self.allocation if allocation is None else self._allocation(allocation))
        if policy != self and isinstance(self.allocation, Decided):
            got = f"budget={budget!r}" if budget is not None else f"{policy.compression_ratio}"
            also = "" if allocation is None else f" with allocation={allocation!r}"
            raise InvalidArgumentError(
                f"this press decides its own budget: expected its compression_ratio={self.compression_ratio}, "
                f"got {got}{also}"
            )
        return policy

    def _allocation(self, given: AllocationLike) -> Allocation:
        """Returns the allocation that is asked for; by a short name the present one, or another with its floors."""
        own = self.allocation
        if isinstance(given, Allocation):
            return given
        if not isinstance(given, str):
            return allocation_of(given)
        if given == (own.like if isinstance(own, Decided) else own.name):
            return own
        return allocation_of(given, min_kept_per_head=own.min_kept_per_head, safeguard=own.safeguard)
