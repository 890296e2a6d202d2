"""What a scorer hands on: the importance of every key/value pair, and how the press would spend a budget on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Scores:
    """Importance of the pairs of one span of tokens (the whole context, or a later turn).

    Attributes:
        layers: ``layer_idx -> [batch, num_key_value_heads, span]``, fp32, higher is more important. Only layers that
            can be compressed appear. What stands at protected or padded positions does not matter.
        protected: ``[batch, span]``, bool: positions that no head may lose (chat-template prefix, sink, window).
        compression_ratio: The fraction to remove that the press was made with.
        allocation: How the press spends its budget, see :data:`kvzip_press.budget.ALLOCATIONS`.
        protected_count: Whether protected pairs count inside the budget, as most papers have it (KVzip does not).
        counts: ``layer_idx -> [batch, num_key_value_heads]``, int64: unprotected pairs to keep, for a press that
            decides its budget itself; None for all others.
    """

    layers: Mapping[int, torch.Tensor]
    protected: torch.Tensor
    compression_ratio: float
    allocation: str = "global"
    protected_count: bool = False
    counts: Mapping[int, torch.Tensor] | None = None

    def __post_init__(self) -> None:
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
    def is_decided(self) -> bool:
        """Whether the press spent its budget itself, so that no other ratio can be asked of these scores."""
        return self.counts is not None

    def with_policy(self, compression_ratio: float | None, allocation: str | None) -> Scores:
        """The same scores under another budget. None keeps the press's own.

        Raises:
            InvalidArgumentError: The press fixed its own budget, and another one is asked for.
        """
        ratio = self.compression_ratio if compression_ratio is None else compression_ratio
        allocation = self.allocation if allocation is None else allocation
        if (ratio, allocation) == (self.compression_ratio, self.allocation):
            return self
        if self.is_decided:
            raise InvalidArgumentError(
                "this press decides its own budget: expected its "
                f"compression_ratio={self.compression_ratio}, got {ratio} with allocation={allocation!r}"
            )
        return replace(self, compression_ratio=ratio, allocation=allocation)
