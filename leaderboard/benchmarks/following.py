"""How closely compressed caches follow the full one over the same contexts: what several benchmarks here measure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press import RaggedCache, answer, generate, question_ids
from kvzip_press.cache.padding import left_padded
from kvzip_press.leaderboard.benchmarks.side_by_side import can_be_joined, groups, joined, log_probabilities_of_all
from kvzip_press.leaderboard.running.agreement import Agreement
from kvzip_press.leaderboard.samples.task import Sample, Task, token_counter
from kvzip_press.model.devices import input_device

COLUMNS = ("kept", "bytes", "KL, nats", "same tokens", "same answers", "accuracy")
FULL_CACHES = 4  # what is asked in one batch holds no more than so many full caches


@dataclass(frozen=True)
class Followed:
    """How a cache followed the full one.

    Attributes:
        kl: Divergence of each token's probabilities, in nats, over the answers that the full cache wrote.
        same: Whether the likeliest token is the same, for each of them.
        unchanged: Whether the cache itself gives the same answer, for each question.
        scores: How right that answer is, in [0, 1].
        kept: Fraction of pairs that it keeps, for each context.
        size: Bytes that it holds, of those of the full cache, for each context.
    """

    kl: tuple[float, ...] = ()
    same: tuple[bool, ...] = ()
    unchanged: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()
    size: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Sequence[Any]]) -> Followed:
        """Returns what :func:`dataclasses.asdict` made a mapping, which may have been JSON."""
        return cls(**{name: tuple(of_name) for name, of_name in values.items()})

    def __add__(self, other: Followed) -> Followed:
        return Followed(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def cells(self) -> list[str]:
        """Returns the cells of a table, under :data:`COLUMNS`, with standard errors over tokens and questions."""
        return [
            f"{statistics.mean(self.kept):.3f}",
            f"{statistics.mean(self.size):.3f}",
            _with_error(self.kl, digits=4),
            f"{statistics.mean(self.same):.3f}",
            _with_error(self.unchanged),
            _with_error(self.scores),
        ]

    def figures(self) -> dict[str, float]:
        """Returns means, and the least and the most that was kept of a context, by name, for a file."""
        means = {name: statistics.mean(map(float, values)) for name, values in vars(self).items()}
        errors = {f"{name}_error": _error(getattr(self, name)) for name in ("kl", "unchanged", "scores")}
        kept = {"kept_least": min(self.kept), "kept_most": max(self.kept), "questions": float(len(self.scores))}
        return means | errors | kept


@dataclass(frozen=True)
class Asked:
    """A context with its questions, and what the full cache answers.

    Attributes:
        task: The task, which says how right an answer is.
        sample: Context and questions.
        tokenizer: The model's tokenizer.
        questions: The ids of each question.
        written: The ids that the full cache wrote after each.
        expected: Log probabilities of these ids, fp64 ``[tokens, vocabulary]``.
        answers: The answers of the full cache.
        nbytes: Bytes of the full cache.
    """

    task: Task
    sample: Sample
    tokenizer: Any
    questions: list[list[int]]
    written: list[list[int]]
    expected: torch.Tensor
    answers: list[str]
    nbytes: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, full: RaggedCache, task: Task, sample: Sample, n_tokens: int) -> Asked:
        """Asks the full cache of a sample's context, and lets it write ``n_tokens`` after each question."""
        asked = [list(question_ids(tokenizer, q.text, answer_prefix=q.answer_prefix)) for q in sample.questions]
        ids, valid = left_padded(asked, input_device(model))
        written = generate(model, joined([full], len(asked)), ids, n_tokens, attention_mask=valid)
        (expected,) = log_probabilities_of_all(model, [full], asked, written)
        (answers,) = _answers(model, tokenizer, [full], sample)
        return cls(task, sample, tokenizer, asked, written, expected, answers, full.dense_bytes)

    def follow(self, model: Any, cache: RaggedCache) -> Followed:
        """Asks another cache of the same context."""
        return self.follow_all(model, [cache])[0]

    def follow_all(
        self, model: Any, caches: Sequence[RaggedCache], *, full: RaggedCache | None = None
    ) -> list[Followed]:
        """Asks other caches of the same context, in batches of at most :data:`FULL_CACHES` times the full one's bytes.

        Args:
            model: The model.
            caches: The caches; they stay as they are.
            full: The full cache, if it is of this model: each batch asks it again, and what it says there is what the
                others are compared with. In 16 bits it would differ from what it says alone by rounding.
        """
        found: list[Followed] = []
        full = full if full is not None and can_be_joined(full) else None
        for group in groups(caches, FULL_CACHES * self.nbytes):
            batch = group if full is None else [full, *group]
            said = log_probabilities_of_all(model, batch, self.questions, self.written)
            answers = _answers(model, self.tokenizer, batch, self.sample)
            expected, usual = (self.expected, self.answers) if full is None else (next(said), answers.pop(0))
            for cache, other, answered in zip(group, said, answers, strict=True):
                found.append(self._followed(cache, Agreement.of(expected, other), answered, usual))
        return found

    def _followed(
        self, cache: RaggedCache, agreement: Agreement, answers: Sequence[str], usual: Sequence[str]
    ) -> Followed:
        pairs = zip(answers, self.sample.questions, strict=True)
        return Followed(
            agreement.kl,
            agreement.same,
            tuple(one == other for one, other in zip(answers, usual, strict=True)),
            tuple(self.task.score(said, question) for said, question in pairs),
            (cache.kept_fraction,),
            (cache.resident_bytes / self.nbytes,),
        )


class Comparing:
    """What a process of a comparison holds; its methods make the parts.

    Args:
        load: Returns model and tokenizer by the model's name and device.
        model: The model's name.
        asked: The contexts and what is asked of them.
        device: The device.
    """

    def __init__(self, load: Callable[[str, str], tuple[Any, Any]], model: str, asked: Any, device: str) -> None:
        self.model, self.tokenizer = load(model, device)
        self.asked = asked

    @property
    def dtype(self) -> str:
        """The model's dtype, by its name."""
        return str(self.model.dtype).removeprefix("torch.")


def samples_of(tokenizer: Any, task: Task, n: int, length_tokens: int, seed: int) -> Sequence[Sample]:
    """Returns samples of a task, with lengths counted by a tokenizer."""
    counter = token_counter(tokenizer)
    return list(task.samples(seed=seed, n=n, length_tokens=length_tokens, count_tokens=counter))


def _answers(model: Any, tokenizer: Any, caches: Sequence[RaggedCache], sample: Sample) -> list[list[str]]:
    """Returns the answers of each cache."""
    questions, n = sample.questions, len(caches)
    prefixes, most = [q.answer_prefix for q in questions], [q.max_new_tokens for q in questions]
    rows = joined(caches, len(questions))
    said = answer(model, tokenizer, rows, [q.text for q in questions] * n, prefixes * n, most * n)
    return [said[start : start + len(questions)] for start in range(0, len(said), len(questions))]


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(map(float, values)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _with_error(values: Sequence[float], digits: int = 3) -> str:
    return f"{statistics.mean(map(float, values)):z.{digits}f} ± {_error(values):.{digits}f}"
