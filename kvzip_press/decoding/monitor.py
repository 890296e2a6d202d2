"""Answers from a small cache, and again from a larger one where the answer looks as if something were missing.

A model that was not sure of a token of its answer may have lost what it needed. What was evicted comes back then
(:meth:`kvzip_press.RaggedCache.restore`), and the question is asked again; most questions never need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvzip_press.arguments.model import takes_model
from kvzip_press.budget.amount import check_compression_ratio
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.answering import answer_ids, decoded
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class MonitoredAnswer:
    """An answer, how sure the model was of it, and from how much of the context it was given.

    Attributes:
        text: The answer.
        margin: The least difference, over the tokens of the answer and its end, between the probabilities of the most
            likely token and the next one, in [0, 1]; 1.0 for an answer of no tokens.
        entropy: The greatest entropy of a token's distribution, in nats.
        n_restored: How many times evicted pairs were brought back for it.
        resident_bytes: Bytes of the cache that gave it, without the question.
    """

    text: str
    margin: float
    entropy: float
    n_restored: int
    resident_bytes: int


@takes_model
def answer_restoring(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str,
    answer_prefix: str = "",
    max_new_tokens: int = 64,
    *,
    min_margin: float | None = None,
    max_entropy: float | None = None,
    compression_ratios: Sequence[float] = (0.0,),
    split_special_tokens: bool = False,
) -> MonitoredAnswer:
    """Answers a question, greedily, and brings evicted pairs back for it while the model is not sure of its answer.

    The answer of the last ratio stands, whether or not the model is sure of it. The cache is unchanged afterwards: what
    comes back belongs to a fork, for this question. Where the bounds should lie depends on the model and its tasks;
    :func:`kvzip_press.calibrate` bounds the loss of a fixed ratio instead.

    Args:
        model: The model that made the cache.
        tokenizer: Its tokenizer.
        cache: A cache of one row that keeps what was evicted, from ``compress(..., cold="cpu")``, say.
        question: The question; see :func:`kvzip_press.answer`, also for the next two and ``split_special_tokens``.
        answer_prefix: How the answer begins.
        max_new_tokens: Most tokens to generate.
        min_margin: Ask again if the margin (:class:`MonitoredAnswer`) of the answer is smaller, in [0, 1].
        max_entropy: Ask again if its entropy is greater, in nats.
        compression_ratios: The fractions of pairs removed to go to, descending, in [0, 1).
        split_special_tokens: Whether control tokens that are spelled out are read as ordinary text.

    Raises:
        CacheFileError: The file of the evicted pairs is gone, or was changed.
        InvalidArgumentError: No bound is given, the ratios do not descend, or begin above what is removed; the cache
            has several rows; or as for :func:`kvzip_press.answer`.
        UnsupportedCacheError: The cache keeps nothing of what was evicted.
    """
    grown = RaggedCache.of(cache).fork()
    ratios = [check_compression_ratio(ratio) for ratio in compression_ratios]
    if min_margin is None and max_entropy is None:
        raise InvalidArgumentError(
            "expected min_margin or max_entropy, below or above which pairs come back, got neither"
        )
    if grown.batch_size != 1 or not isinstance(question, str):
        raise InvalidArgumentError(
            f"expected one question of a cache of one row, got {question!r:.80} and {grown.batch_size} rows"
        )
    if not ratios or ratios != sorted(set(ratios), reverse=True):
        raise InvalidArgumentError(
            f"expected compression_ratios that descend, at least one, got {compression_ratios!r:.80}"
        )
    if not grown.cold_bytes:
        grown.restore()  # says what is missing, before anything is asked

    def asked() -> MonitoredAnswer:
        sure, size = _Sureness(), grown.resident_bytes
        options: dict[str, Any] = {"split_special_tokens": split_special_tokens, "watch": sure.see}
        [ids] = answer_ids(model, tokenizer, grown, question, answer_prefix, max_new_tokens, **options)
        return MonitoredAnswer(decoded(tokenizer, ids), sure.margin, sure.entropy, n_restored=0, resident_bytes=size)

    answered, highest = asked(), math.inf if max_entropy is None else max_entropy
    for number, ratio in enumerate(ratios, start=1):
        if answered.margin >= (min_margin or 0.0) and answered.entropy <= highest:
            break
        grown.restore(ratio)
        answered = replace(asked(), n_restored=number)
    return answered


class _Sureness:
    """How sure a model was of the tokens that it chose so far."""

    def __init__(self) -> None:
        self.margin, self.entropy = 1.0, 0.0

    def see(self, logits: torch.Tensor) -> None:
        """Takes the logits ``[1, vocabulary]`` of a step into account."""
        logs = logits[0].float().log_softmax(dim=-1)
        best = logs.topk(2).values.exp()
        margin, entropy = torch.stack([best[0] - best[1], -(logs.exp() * logs).nansum()]).tolist()
        self.margin, self.entropy = min(self.margin, margin), max(self.entropy, entropy)
