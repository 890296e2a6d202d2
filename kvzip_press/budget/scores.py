"""The result of a scorer: the importance of every key/value pair, and how the press would spend a budget on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvzip_press.budget.allocators import Allocation, Decided
from kvzip_press.budget.policy import Policy
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Scores:
    """Importance of the pairs of one span of tokens (the whole context, or a later turn).

    Attributes:
        layers: ``layer_idx -> [batch, num_key_value_heads, span]``, fp32, higher is more important. Only layers that
            can be compressed appear. The values at protected or padded positions do not matter, but must be finite.
        protected: ``[batch, span]``, bool: positions that no head may lose (chat-template prefix, sink, window).
        policy: How much the press would keep and how it would spend that. A press that decides itself how many pairs
            each head keeps uses a policy with :class:`kvzip_press.budget.allocators.Decided`.
        protected_count: Whether protected pairs count towards the budget, as in most papers (not in KVzip); or a mask
            ``[batch, span]``, bool, if only those of some positions do (Fast KVzip: the window, not the prefix).
        carried: Whether the pairs that stay carry their scores, for evictions while the model generates.

    Raises:
        InvalidArgumentError: The scores are not finite or not of one span, ``policy`` is not a Policy, or the policy is
            for other layers than were scored.
    """

    layers: Mapping[int, torch.Tensor]
    protected: torch.Tensor
    policy: Policy
    protected_count: bool | torch.Tensor = False
    carried: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise InvalidArgumentError(f"expected a Policy, as `press.policy` is one, got {self.policy!r}")
        self.policy.amount.check_layers(self.layers)
        if isinstance(self.policy.allocation, Decided):
            self._check_decided(self.policy.allocation)
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
        """``[batch, span]``, bool: the protected positions whose pairs count towards the budget."""
        return self.protected & self.protected_count

    @property
    def is_decided(self) -> bool:
        """Whether the press decided the counts itself, so that no other ratio can be asked of these scores."""
        return isinstance(self.policy.allocation, Decided)

    def asked_for(
        self,
        compression_ratio: float | None = None,
        allocation: str | Allocation | None = None,
        budget: int | None = None,
    ) -> Scores:
        """Returns the same scores with the policy that an eviction asks for; None leaves a value as it is.

        Raises:
            InvalidArgumentError: A value is out of range, both a ratio and a budget are given, or the press decided its
                own counts and something else is asked for.
        """
        policy = self.policy.asked(compression_ratio, allocation, budget)
        return self if policy == self.policy else replace(self, policy=policy)

    def _check_decided(self, allocation: Decided) -> None:
        expected = {i: tuple(values.shape[:2]) for i, values in self.layers.items()}
        got = {
            i: tuple(counts.shape) if isinstance(counts, torch.Tensor) and counts.dtype == torch.int64 else type(counts)
            for i, counts in allocation.per_head.items()
        }
        if got != expected:
            raise InvalidArgumentError(
                f"expected decided counts as int64 tensors of these layers and [batch, heads]: {expected}, got {got}"
            )
