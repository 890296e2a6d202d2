"""How closely compressed caches follow the full one over the same contexts: what several benchmarks here measure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press import RaggedCache, generate, question_ids
from kvzip_press.leaderboard.running.agreement import Agreement, log_probabilities
from kvzip_press.leaderboard.samples.task import Sample, Task
from kvzip_press.leaderboard.tasks import get_task


@dataclass(frozen=True)
class Followed:
    """How a cache followed the full one.

    Attributes:
        agreement: Token by token, over the answers that the full cache wrote.
        unchanged: Whether the cache itself writes the same answer, for each question.
        kept: Fraction of pairs that it keeps, for each context.
        size: Bytes that it holds, of those of the full cache, for each context.
    """

    agreement: Agreement = Agreement((), ())  # noqa: RUF009  # it is immutable
    unchanged: tuple[bool, ...] = ()
    kept: tuple[float, ...] = ()
    size: tuple[float, ...] = ()

    def __add__(self, other: Followed) -> Followed:
        return Followed(
            self.agreement + other.agreement,
            self.unchanged + other.unchanged,
            self.kept + other.kept,
            self.size + other.size,
        )

    def cells(self) -> list[str]:
        """Returns the cells of a table: see :data:`COLUMNS`."""
        kl, share = self.agreement.kl, statistics.mean(self.unchanged)
        spread = statistics.stdev(kl) / math.sqrt(len(kl))
        error = math.sqrt(share * (1 - share) / len(self.unchanged))
        return [
            f"{statistics.mean(self.kept):.3f}",
            f"{statistics.mean(self.size):.3f}",
            f"{self.agreement.mean_kl:.4f} ± {spread:.4f}",
            f"{self.agreement.share:.3f}",
            f"{share:.3f} ± {error:.3f}",
        ]

    def figures(self) -> dict[str, Any]:
        """Returns the same as numbers, for a file."""
        return {
            "kept": statistics.mean(self.kept),
            "kept_least": min(self.kept),
            "kept_most": max(self.kept),
            "size": statistics.mean(self.size),
            "kl": self.agreement.mean_kl,
            "same": self.agreement.share,
            "unchanged": statistics.mean(self.unchanged),
            "questions": len(self.unchanged),
        }


COLUMNS = ("kept", "bytes", "KL, nats", "same tokens", "same answers")


@dataclass(frozen=True)
class Asked:
    """The questions about one context, as token ids, and what the full cache answers.

    Attributes:
        questions: The ids of each question.
        written: The ids of each answer.
        expected: Log probabilities of the answers' tokens, fp64 ``[tokens of all answers, vocabulary]``.
        nbytes: Bytes of the full cache.
    """

    questions: list[list[int]]
    written: list[list[int]]
    expected: torch.Tensor
    nbytes: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, full: RaggedCache, sample: Sample, answer_tokens: int) -> Asked:
        """Asks the full cache of a sample's context."""
        asked = [list(question_ids(tokenizer, q.text, answer_prefix=q.answer_prefix)) for q in sample.questions]
        written = [generate(model, full.fork(), [ids], answer_tokens)[0] for ids in asked]
        return cls(asked, written, log_probabilities(model, full, asked, written), full.dense_bytes)

    def follow(self, model: Any, cache: RaggedCache) -> Followed:
        """Asks another cache of the same context."""
        found = log_probabilities(model, cache, self.questions, self.written)
        answers = [
            generate(model, cache.fork(), [ids], len(written))[0]
            for ids, written in zip(self.questions, self.written, strict=True)
        ]
        return Followed(
            Agreement.of(self.expected, found),
            tuple(answer == written for answer, written in zip(answers, self.written, strict=True)),
            (cache.kept_fraction,),
            (cache.resident_bytes / self.nbytes,),
        )


def samples_of(tokenizer: Any, name: str, n: int, length_tokens: int, seed: int, **options: Any) -> Sequence[Sample]:
    """Returns samples of a task, with lengths counted by a tokenizer."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    task: Task = get_task(name, **options)
    return list(task.samples(seed=seed, n=n, length_tokens=length_tokens, count_tokens=count))
