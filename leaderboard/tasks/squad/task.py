"""SQuAD, grouped by context, as in KVzip's evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.metrics.originals import contains
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask, by_context
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Question


@dataclass(frozen=True)
class SQuADTask(HubTask):
    """Paragraphs of Wikipedia, each with all its questions.

    Attributes:
        split: "train", as in KVzip's evaluation, or "validation".
        max_new_tokens: The most tokens of an answer.
    """

    in_order: bool = True
    split: str = "train"
    max_new_tokens: int = 256
    name: str = "squad"
    revision: str = "7b6d24c440a36b6815f21b70d25016731768db1f"

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        return HubFiles("rajpurkar/squad", f"plain_text/{self.split}-*.parquet", ("context", "question", "answers"))

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the answer contains a reference."""
        return contains(prediction, question.references)

    def _documents(self) -> list[list[Record]]:
        return by_context(self.rows)

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        return rows[0].text("context"), [
            Question(f"{index:03d}", f"Q: {row.text('question')}", _texts(row), max_new_tokens=self.max_new_tokens)
            for index, row in enumerate(rows)
        ]


def _texts(row: Record) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.record("answers").references("text")))
