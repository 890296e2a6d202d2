"""The hyper-parameters by which gates of TrimKV are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvzip_press.errors import InvalidArgumentError, did_you_mean

ATTENTION, DISTILLATION = "attention", "distillation"
OBJECTIVES = (ATTENTION, DISTILLATION)


@dataclass(frozen=True)
class TrimKVRecipe:
    """The hyper-parameters of a training.

    The optimiser is Adam; its rate falls to 0 along a half cosine.

    Args:
        memory_size: Pairs of a head that are worth keeping; best about the budget that the gates will be used with.
        width: Width of a gate's hidden layer; 512 in the released ones.
        steps: Optimiser steps; of "attention", eight of them follow each forward pass.
        lr: Learning rate.
        moments: Moments of a text at which a step of "attention", and the evaluation, look at the pairs.
        seed: Seed of everything that is drawn.
        objective: What gates learn. "attention": which pairs a full cache still looks at later, by forward passes
            alone (:mod:`.foreseen`). "distillation": the paper's, to change the model's outputs little while few pairs
            are held, through the whole model (:mod:`.distilled`).
        capacity_weight: Of "distillation": factor of the capacity term beside the divergence; the paper's lambda.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    memory_size: int = 512
    width: int = 512
    steps: int = 5000
    lr: float = 1e-3
    moments: int = 8
    seed: int = 0
    objective: str = ATTENTION
    capacity_weight: float = 1.0

    def __post_init__(self) -> None:
        least = min(self.memory_size, self.width, self.steps, self.moments)
        if least < 1 or self.seed < 0 or not self.lr > 0 or not self.capacity_weight >= 0:
            raise InvalidArgumentError(
                "expected memory_size, width, steps and moments of 1 or more, seed >= 0, lr > 0 and "
                f"capacity_weight >= 0, got {self}"
            )
        if self.objective not in OBJECTIVES:
            hint = did_you_mean(str(self.objective), OBJECTIVES)
            raise InvalidArgumentError(f"expected an objective out of {OBJECTIVES}, got {self.objective!r:.40}{hint}")

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
