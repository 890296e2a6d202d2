"""OpenAI's MRCR: repeat the n-th answer to a request that was made several times."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.metrics.originals import mrcr
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask, Row
from kvzip_press.leaderboard.samples.task import Question


@dataclass(frozen=True)
class MRCRTask(HubTask):
    """Long conversations as one text; the last message is the question.

    Attributes:
        max_new_tokens: The most tokens of an answer.
    """

    max_new_tokens: int = 512
    name: str = "mrcr"
    revision: str = "f4c69fae7cf81f7ca26b9fee34b392a50f6b8a1d"

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        return HubFiles("openai/mrcr", "*needle*.parquet", ("prompt", "answer", "random_string_to_prepend"))

    def score(self, prediction: str, question: Question) -> float:
        """Returns the answer's similarity to the right one; 0.0 unless it begins with the string that was asked for."""
        return mrcr(prediction, question.references, str(question.tags["prefix"]))

    def _sample(self, rows: Sequence[Row]) -> tuple[str, list[Question]]:
        (row,) = rows
        *messages, last = json.loads(row["prompt"])
        context = "".join(f"{message['role'].title()}: {message['content']}\n\n" for message in messages)
        tags = {"prefix": row["random_string_to_prepend"]}
        asked = Question("last", last["content"], (row["answer"],), max_new_tokens=self.max_new_tokens, tags=tags)
        return context, [asked]
