"""Follows the full cache behind a context: what it writes to a question, every other cache of the context reads.

Presses that evict while they write are followed by `following`, where a sample has no context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.attention.implementation import attach
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.sampling import Sampling
from kvzip_press.leaderboard.running.agreement import Agreement, log_probabilities_at_once
from kvzip_press.leaderboard.running.following import TEMPERATURE
from kvzip_press.model.devices import input_device


@dataclass(frozen=True)
class FullReply:
    """What a model wrote behind a context and a question from the full cache.

    Attributes:
        question: The ids that it read behind the context.
        written: The ids that it wrote.
        expected: Log probabilities of each, ``[n, vocabulary]``, fp32.
    """

    question: Sequence[int]
    written: Sequence[int]
    expected: torch.Tensor

    @classmethod
    def of(cls, model: Any, cache: RaggedCache, question: Sequence[int], n_tokens: int, *, seed: int) -> FullReply:
        """Lets a model write from a full cache, sampled by a seed; a token that ends an answer does not end it.

        Args:
            model: The model.
            cache: A cache of one row that keeps all pairs; it stays as it is.
            question: The ids that follow the context, at least one.
            n_tokens: Number of tokens, at least 1.
            seed: Of the sampling, at `TEMPERATURE`.
        """
        attach(model)
        ids = torch.tensor([list(question)], device=input_device(model))
        (written,) = generate(model, cache.fork(), ids, n_tokens, sampling=Sampling(TEMPERATURE, seed=seed))
        return cls(question, written, log_probabilities_at_once(model, cache, question, written))

    def followed_by(self, model: Any, cache: RaggedCache) -> tuple[Agreement, list[int]]:
        """Returns how closely a cache of one row follows it, and the ids that this one held for most likely."""
        found = log_probabilities_at_once(model, cache, self.question, self.written)
        return Agreement.of(self.expected, found), found.argmax(dim=-1).tolist()
