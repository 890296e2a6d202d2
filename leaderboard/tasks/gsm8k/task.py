"""GSM8K as KVzip poses it."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.metrics.originals import last_answer
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Question

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
        return [[row] for row in self.rows if len(_parts(row)[0]) >= self.min_characters]

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        context, asked = _parts(rows[0])
        gold = rows[0].text("answer").strip().rpartition("#### ")[2]
        return context, [Question("last", f"{_ASK}{asked}", (gold,), max_new_tokens=self.max_new_tokens)]


def _parts(row: Record) -> tuple[str, str]:
    """Splits a row's problem into context and question."""
    context, _, asked = row.text("question").rpartition(". ")
    return f"{context.strip()}.", asked.strip()
