"""Calibrates a press on prompts: asks the full cache and smaller ones, and bounds how many answers change."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kvzip_press.arguments.model import takes_model
from kvzip_press.arguments.press import ForeignPress, as_press
from kvzip_press.budget.amount import check_compression_ratio
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.calibration.bounds import most_failures, n_needed, n_passed
from kvzip_press.calibration.certificate import Calibration, Certificate, Step
from kvzip_press.decoding.answering import answer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import Context
from kvzip_press.model.structure import text_decoder
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.prefilling.eviction import check_storage
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import Press

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
logger = logging.getLogger(__name__)


@takes_model
def calibrate(
    model: Any,
    tokenizer: Any,
    press: Press | ForeignPress,
    prompts: Iterable[tuple[Context, str]],
    max_loss: float = 0.01,
    confidence: float = 0.95,
    *,
    compression_ratios: Sequence[float] = RATIOS,
    storages: Sequence[str] = ("model",),
    max_new_tokens: int = 64,
    changed: Callable[[str, str], bool] = operator.ne,
) -> Calibration:
    """Finds the fewest bytes at which a press changes no more than a given part of the answers to a user's prompts.

    Each context is read once and scored once. Its questions are answered, greedily, by the full cache and at each
    ratio. Ratios are tested from the smallest up until too many contexts have a changed answer: Learn then Test with a
    fixed sequence (Angelopoulos et al., arXiv 2110.01052) and the exact binomial tail, so the bound holds for any
    number of contexts, whatever the press does. Several storages are a sequence each, which share the probability of an
    error (Bonferroni). All questions about one context are one observation, changed if any answer is.

    The bound is about contexts that are drawn as these were, independently of each other. It says nothing of other
    kinds of prompts, and calibrating again on the same prompts, until the result pleases, breaks it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        press: A press that scores (``is_scorer``); its own ratio and storage do not matter.
        prompts: Pairs of a context and a question, as :func:`kvzip_press.answer` takes them; contexts that are equal
            are one.
        max_loss: The bound on the rate of contexts with a changed answer, in (0, 1).
        confidence: The probability that the bound holds, in (0, 1).
        compression_ratios: The ratios to test, ascending, in (0, 1).
        storages: The storages to test.
        max_new_tokens: The most tokens of each answer.
        changed: Whether two answers, of the full cache and of a smaller one, count as different; by default if their
            texts are not the same.

    Returns:
        The press with the ratio and the storage of the fewest bytes whose rate is bounded, and the certificate. If not
        even the smallest ratio passes, the press removes nothing, which changes nothing.

    Raises:
        InvalidArgumentError: There are too few contexts to bound anything, even if no answer changed (the message says
            how many are needed); the press decides its own counts, or evicts while the model generates; a prompt or a
            value is not as above.
    """
    chosen: Press = as_press(press)
    _check_press(chosen)
    contexts = _by_context(prompts)
    if not (0 < max_loss < 1 and 0 < confidence < 1):
        raise InvalidArgumentError(f"expected max_loss and confidence in (0, 1), got {max_loss} and {confidence}")
    trials = _trials(model, compression_ratios, storages)
    delta = (1 - confidence) / len(trials)
    needed = n_needed(max_loss, delta)
    if len(contexts) < needed:
        raise InvalidArgumentError(
            f"expected at least {needed} contexts to bound the rate of changed answers by {max_loss} with a confidence "
            f"of {confidence}, even if none changed, got {len(contexts)}: calibrate on more, or allow more"
        )
    limit = most_failures(len(contexts), max_loss, delta)
    for context, questions in contexts:
        asked = _Asked(model, tokenizer, questions, max_new_tokens, changed)
        done = prefill(model, tokenizer, context, observers=[chosen])
        scores = chosen.score(done)
        before = asked.of(done.evict(scores, 0.0, storage="model"))
        for trial in trials:
            trial.look(asked, done, scores, before, limit)
    steps = [step for trial in trials for step in trial.steps(len(contexts), max_loss, delta)]
    best = min((step for step in steps if step.passed), key=lambda step: step.resident_fraction, default=None)
    if best is None:
        logger.warning("%s removes nothing: at each ratio, too many answers may change", chosen)
        best = Step(0.0, "model", 0, len(contexts), 1.0, passed=True)
    result = chosen.with_ratio(best.compression_ratio, storage=best.storage)
    certificate = Certificate(
        max_loss=max_loss,
        confidence=confidence,
        n=len(contexts),
        n_questions=sum(len(questions) for _, questions in contexts),
        n_changed=best.n_changed,
        press=str(result),
        compression_ratio=best.compression_ratio,
        storage=best.storage,
        resident_fraction=best.resident_fraction,
        max_new_tokens=max_new_tokens,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=weights_fingerprint(text_decoder(model)),
        steps=tuple(steps),
    )
    return Calibration(result, certificate)


@dataclass(frozen=True)
class _Asked:
    """The questions about one context."""

    model: Any
    tokenizer: Any
    questions: list[str]
    max_new_tokens: int
    changed: Callable[[str, str], bool]

    def of(self, cache: RaggedCache) -> list[str]:
        """Returns the answers that a cache gives."""
        return answer(self.model, self.tokenizer, cache, self.questions, max_new_tokens=self.max_new_tokens)

    def differ(self, cache: RaggedCache, before: list[str]) -> bool:
        """Returns whether any answer of a cache is another."""
        return any(self.changed(old, new) for old, new in zip(before, self.of(cache), strict=True))


@dataclass
class _Count:
    """What one ratio did to the contexts so far."""

    compression_ratio: float
    n_changed: int = 0
    n: int = 0
    resident: int = 0
    dense: int = 0


@dataclass
class _Trial:
    """The fixed sequence of one storage."""

    storage: str
    counts: list[_Count]

    def look(self, asked: _Asked, done: Prefill, scores: Scores, before: list[str], limit: int) -> None:
        """Asks a context at each ratio up to the first that can no longer pass; those behind it are not tested."""
        for count in self.counts:
            if count.n_changed > limit:
                return
            cache = done.evict(scores, count.compression_ratio, storage=self.storage)
            count.n += 1
            count.n_changed += asked.differ(cache, before)
            count.resident += cache.resident_bytes
            count.dense += cache.dense_bytes

    def steps(self, n: int, max_loss: float, delta: float) -> list[Step]:
        """Returns what was found at each ratio that was looked at."""
        passed = n_passed([count.n_changed for count in self.counts], n, max_loss, delta)
        return [
            Step(
                count.compression_ratio,
                self.storage,
                count.n_changed,
                count.n,
                count.resident / count.dense,
                passed=number < passed,
            )
            for number, count in enumerate(self.counts)
            if count.n
        ]


def _check_press(press: Press) -> None:
    if press.evicts_while_decoding or not press.is_scorer:
        raise InvalidArgumentError(
            f"expected a press that scores, of which each ratio can be asked, and that evicts no pair while the model "
            f"generates, got {press}"
        )
    press.with_ratio(0.5)  # raises if it has none


def _trials(model: Any, ratios: Sequence[float], storages: Sequence[str]) -> list[_Trial]:
    """Returns the sequences to test; a storage that rounds is tested without removing anything first."""
    checked = [check_compression_ratio(ratio) for ratio in ratios]
    if not checked or checked != sorted(set(checked)) or checked[0] == 0:
        raise InvalidArgumentError(f"expected compression_ratios that ascend, in (0, 1), got {list(ratios)!r:.80}")
    if isinstance(storages, str) or not storages or len(set(storages)) < len(storages):
        raise InvalidArgumentError(f"expected storages as a list of different names, got {storages!r:.80}")
    trials = []
    for storage in storages:
        check_storage(model, storage)
        first = [] if storage_named(storage).is_exact else [0.0]
        trials.append(_Trial(storage, [_Count(ratio) for ratio in (*first, *checked)]))
    return trials


def _by_context(prompts: Iterable[tuple[Context, str]]) -> list[tuple[Context, list[str]]]:
    """Returns each context with the questions about it, in the order in which contexts come first."""
    contexts: dict[Any, tuple[Context, list[str]]] = {}
    for prompt in prompts:
        if not isinstance(prompt, tuple | list) or len(prompt) != 2 or not isinstance(prompt[1], str):
            raise InvalidArgumentError(f"expected prompts as pairs (context, question), got {prompt!r:.80}")
        context, question = prompt
        key = context if isinstance(context, str) else tuple(int(token) for token in context)
        contexts.setdefault(key, (context, []))[1].append(question)
    return list(contexts.values())
