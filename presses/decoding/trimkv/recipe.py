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
        for name, least in {"memory_size": 1, "width": 1, "steps": 1, "moments": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise InvalidArgumentError(f"expected {name} >= {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise InvalidArgumentError(f"expected lr > 0, got {self.lr}")
        if not self.capacity_weight >= 0:
            raise InvalidArgumentError(f"expected capacity_weight >= 0, got {self.capacity_weight}")
        if self.objective not in OBJECTIVES:
            raise InvalidArgumentError(
                f"expected objective to be one of {OBJECTIVES}, got {self.objective!r:.40}"
                f"{did_you_mean(self.objective, OBJECTIVES)}"
            )

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
