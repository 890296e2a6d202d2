"""Chooses the next token from logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.errors import InvalidArgumentError


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Returns the most likely token of each row: ids ``[batch]`` from logits ``[batch, vocabulary]``."""
    return logits.argmax(dim=-1)


@dataclass(frozen=True)
class Sampling:
    """How to sample the next token, with transformers' own warpers in its order.

    Args:
        temperature: Divides the logits, above 0.
        top_k: Sample from the k most likely tokens; None for all.
        top_p: Sample from the fewest tokens that together have this probability, in (0, 1]; None for all.
        seed: Seed of the random numbers; None uses PyTorch's default generator.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InvalidArgumentError(f"expected temperature > 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidArgumentError(f"expected top_k >= 1 or None, got {self.top_k}")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise InvalidArgumentError(f"expected seed as an int or None, got {self.seed!r:.80}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidArgumentError(f"expected top_p in (0, 1] or None, got {self.top_p}")

    def sampler(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns a function from logits ``[batch, vocabulary]`` to sampled ids ``[batch]``.

        With a seed, each function has random numbers of its own.
        """
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(self.top_p))
        generators: dict[torch.device, torch.Generator] = {}

        def sample(logits: torch.Tensor) -> torch.Tensor:
            generator = None
            if self.seed is not None:
                device = logits.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(self.seed)
                generator = generators[device]
            probabilities = warpers(None, logits.float()).softmax(dim=-1)
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

        return sample
