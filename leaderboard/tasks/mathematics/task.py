"""AIME 2024 and MATH-500, as Fast KVzip poses them: no context, the problem is the whole prompt."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.metrics.mathematics import math_equal
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Question

_PROMPT = (
    "You are given a math problem.\n\nProblem: {problem}\n\n You need to solve the problem step by step. First, you "
    "need to provide the chain-of-thought, then provide the final answer.\n\n Provide the final answer in the format: "
    "Final answer:  \\boxed{{}}"
)


@dataclass(frozen=True)
class MathematicsTask(HubTask, ABC):
    """The base class of both tasks.

    Attributes:
        max_new_tokens: The most tokens of an answer, reasoning included.
    """

    max_new_tokens: int = 16384

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the result is right."""
        return math_equal(prediction, question.references)

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        (row,) = rows
        text = _PROMPT.format(problem=row.text("problem"))
        return "", [
            Question("problem", text, row.references("answer", numbers=True), max_new_tokens=self.max_new_tokens)
        ]


@dataclass(frozen=True)
class AIME24Task(MathematicsTask):
    """The thirty problems of 2024; answers are integers of up to three digits."""

    max_new_tokens: int = 32768
    name: str = "aime24"
    revision: str = "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        return HubFiles("HuggingFaceH4/aime_2024", "data/train-*.parquet", ("problem", "answer"))


@dataclass(frozen=True)
class MATH500Task(MathematicsTask):
    """Five hundred problems of MATH's test split; answers are expressions."""

    name: str = "math500"
    revision: str = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        return HubFiles("HuggingFaceH4/MATH-500", "test.jsonl", ("problem", "answer"))
