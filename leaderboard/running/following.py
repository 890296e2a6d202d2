"""Follows the full cache: reads what it wrote once more inside a press, and compares what each expects next.

Between two evictions nothing leaves the cache, so the tokens of that stretch are read in one forward: what is compared,
and what goes, is as if they had been written one by one. So that the most that a cache holds is seen, the first
stretches end a token earlier; where queries are kept until they are looked at, which may take less memory in a
stretch, they are read token by token, as they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.compat import DynamicCache
from kvzip_press.decoding.eviction import decode_eviction_in
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.sampling import Sampling
from kvzip_press.leaderboard.running.agreement import Agreement
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import text_config
from kvzip_press.press import Press

TEMPERATURE = 0.7
"""Of sampled answers: the likeliest tokens of a small model soon repeat themselves, which any cache can follow."""

_SEEN = 2  # evictions, between which the cache is as large as it ever gets
_AT_ONCE = 256  # tokens of one forward at most, so that logits of a long answer never lie in memory all at once


@dataclass(frozen=True)
class FullAnswer:
    """What a model wrote from a full cache.

    Attributes:
        prompt: int64 ``[1, n]``.
        tokens: int64 ``[1, n_tokens]``.
        logits: ``[n_tokens, vocabulary]``, those that each token was chosen from, in the model's dtype.
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Followed:
    """How a press followed a full answer.

    Attributes:
        agreement: Token by token.
        likeliest: The ids that the press's cache held for most likely.
        cache: The cache as it is afterwards.
        most_bytes: The most that it held between two tokens, queries and room in its tails included.
    """

    agreement: Agreement
    likeliest: list[int]
    cache: RaggedCache
    most_bytes: int


def full_answer(model: Any, prompt: Sequence[int], n_tokens: int, *, seed: int | None = None) -> FullAnswer:
    """Lets a model write from a full cache; a token that ends an answer does not end it.

    Args:
        model: The model.
        prompt: Its ids.
        n_tokens: Number of tokens, at least 1.
        seed: Samples at `TEMPERATURE` with this seed; None takes the most likely tokens.
    """
    ids = torch.tensor([list(prompt)], device=input_device(model))
    sampling = None if seed is None else Sampling(TEMPERATURE, seed=seed)
    logits: list[torch.Tensor] = []
    (tokens,) = generate(
        model,
        DynamicCache(config=text_config(model)),
        ids,
        n_tokens,
        sampling=sampling,
        watch=lambda step: logits.append(step[0].clone()),
    )
    return FullAnswer(ids, torch.tensor([tokens], device=ids.device), torch.stack(logits))


@torch.no_grad()
def follow(model: Any, press: Press, answer: FullAnswer) -> Followed:
    """Reads a prompt and its full answer inside a press.

    Args:
        model: The model that wrote the answer.
        press: A press that evicts while the model writes, or one that removes nothing.
        answer: The answer.
    """
    cache = DynamicCache(config=text_config(model))
    given, compared, n_read = answer.tokens[:, :-1], _Compared(answer.logits), 0
    with press(model):
        compared.add(_read(model, cache, answer.prompt, 1))
        most_bytes = RaggedCache.of(cache).resident_bytes
        stretches = _Stretches(model, cache)
        while n_read < given.shape[1]:
            step = given[:, n_read : n_read + stretches.next_length()]
            compared.add(_read(model, cache, step, 0))
            most_bytes = max(most_bytes, RaggedCache.of(cache).resident_bytes)
            n_read += step.shape[1]
    return Followed(compared.agreement, compared.likeliest, RaggedCache.of(cache), most_bytes)


class _Stretches:
    """How many tokens can be read at once, up to the one with which pairs go; fewer until that was seen twice."""

    def __init__(self, model: Any, cache: Any) -> None:
        self._eviction = decode_eviction_in(model, cache)
        self._cache = cache
        self._n_left, self._n_evictions = 0, 0

    def next_length(self) -> int:
        if self._eviction is None:
            return _AT_ONCE
        n_left = self._eviction.tokens_to_eviction(self._cache)
        self._n_evictions += n_left > self._n_left > 0
        self._n_left = n_left
        if self._n_evictions >= _SEEN:
            return min(n_left, _AT_ONCE)
        return 1 if self._eviction.scorer.holds_queries else min(max(n_left - 1, 1), _AT_ONCE)


def _read(model: Any, cache: Any, ids: torch.Tensor, n_last: int) -> torch.Tensor:
    output = model(input_ids=ids, use_cache=True, logits_to_keep=n_last, **compat.cache_argument(model, cache))
    logits: torch.Tensor = output.logits[0]
    return logits


class _Compared:
    """Compares logits with those of the full cache, as they come."""

    def __init__(self, full: torch.Tensor) -> None:
        self._full, self._n_seen = full, 0
        self.agreement, self.likeliest = Agreement((), ()), list[int]()

    def add(self, logits: torch.Tensor) -> None:
        """Takes the logits ``[n, vocabulary]`` of the next n tokens."""
        full = self._full[self._n_seen : self._n_seen + len(logits)]
        self.agreement += Agreement.of(*(side.float().log_softmax(dim=-1) for side in (full, logits)))
        self.likeliest += logits.argmax(dim=-1).tolist()
        self._n_seen += len(logits)
