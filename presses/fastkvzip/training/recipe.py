"""The recipe by which gates are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.fastkvzip.training.features import teacher

#: Called with the name of the current work, how much of it is done, how much there is, and a remark.
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a training; by default the published ones.

    The optimiser is SGD with momentum 0.9. The rate warms up over 50 steps to its full height (the authors' warm-up
    stops at half of it and then jumps), and is halved after half and after three quarters of the steps.

    Args:
        tokens: Tokens to train on.
        held_out_tokens: Tokens of other documents to evaluate with.
        steps: Optimiser steps, over all rounds.
        batch_size: Tokens per step, the same for all layers.
        lr: Learning rate.
        dim: Dimensions of a gate's queries and keys.
        n_sink: Learned sinks of a gate.
        seed: Seed of everything that is drawn.
        piece_tokens: The most tokens of a document that are read at a time.
        disk_bytes: The most bytes of features on disk; if not all fit, training takes several rounds.
        weighting: How the teacher, KVzip, weighs the rows of its replay; None as published. See
            :class:`kvzip_press.KVzipPress`.

    Raises:
        InvalidArgumentError: A value out of range.
    """

    tokens: int = 1_000_000
    held_out_tokens: int = 20_000
    steps: int = 5000
    batch_size: int = 1000
    lr: float = 0.2
    dim: int = 16
    n_sink: int = 16
    seed: int = 0
    piece_tokens: int = 16384
    disk_bytes: int = 20 * 10**9
    weighting: str | None = None

    def __post_init__(self) -> None:
        for name, least in {
            "tokens": 64,
            "held_out_tokens": 32,
            "steps": 1,
            "batch_size": 1,
            "dim": 1,
            "n_sink": 1,
            "seed": 0,
            "piece_tokens": 64,
            "disk_bytes": 1,
        }.items():
            if getattr(self, name) < least:
                raise InvalidArgumentError(f"expected {name} >= {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise InvalidArgumentError(f"expected lr > 0, got {self.lr}")
        teacher(self.weighting)  # raises for a weighting that there is not

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        part = step / self.steps
        return self.lr * min(1.0, (step + 1) / 50) * (1.0 if part < 0.5 else 0.5 if part < 0.75 else 0.25)
