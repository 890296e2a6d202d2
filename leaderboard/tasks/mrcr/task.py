"""OpenAI's MRCR: repeat the n-th answer to a request that was made several times."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.metrics.originals import mrcr
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Question
from kvzip_press.untrusted import parse_json


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

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        (row,) = rows
        *messages, last = _messages(row)
        context = "".join(f"{message.text('role').title()}: {message.text('content')}\n\n" for message in messages)
        tags = {"prefix": row.text("random_string_to_prepend")}
        asked = Question(
            "last", last.text("content"), row.references("answer"), max_new_tokens=self.max_new_tokens, tags=tags
        )
        return context, [asked]


def _messages(row: Record) -> list[Record]:
    """Returns a conversation, which is a list of JSON objects."""
    try:
        found = parse_json(row.text("prompt"))
    except ValueError as error:
        raise InvalidArgumentError(f"{row.place}: expected 'prompt' to be JSON ({error})") from error
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        raise InvalidArgumentError(f"{row.place}: expected 'prompt' to be a list of messages, got {found!r:.80}")
    return [Record(f"{row.place}, message {place}", message) for place, message in enumerate(found, start=1)]
