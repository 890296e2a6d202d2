"""A needle in essays, as in KVzip's evaluation."""

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.metrics.originals import contains
from kvzip_press.leaderboard.samples.haystack import needle_depths
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubData
from kvzip_press.leaderboard.samples.task import Question, Sample, TokenCounter, approximate_tokens

NEEDLE = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
GOLD = "Eat a sandwich and sit in Dolores Park on a sunny day."
QUESTION = "Q: Based on the content of the book, the best thing to do in San Francisco is: "
DEPTHS = 11  # 0, 10 ... 100 percent


@dataclass(frozen=True)
class EssaysTask(HubData):
    """Essays with a needle: sample ``i`` has it at a depth of ``10 * (i % 11)`` percent, behind the last full stop.

    Attributes:
        max_new_tokens: The most tokens of an answer.
    """

    max_new_tokens: int = 48
    name: str = "niah_essays"

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        return HubFiles("alessiodevoto/paul_graham_essays", "*test-*.parquet", ("context",))

    def samples(
        self, *, seed: int, n: int, length_tokens: int, count_tokens: TokenCounter = approximate_tokens
    ) -> Iterator[Sample]:
        """Yields ``n`` samples of at most ``length_tokens`` tokens, a few short where one more word would not fit.

        After every eleven samples the essays begin a sixteenth of their length later, so that the text differs.
        """
        for index in range(n):
            begin = len(self._essays) * (index // DEPTHS % 16) // 16
            hay = _longest(self._essays[begin:] + self._essays[:begin], length_tokens, count_tokens)
            at = _sentence_end(hay, index % DEPTHS / (DEPTHS - 1))
            context = (hay[:at] + NEEDLE + hay[at:]).strip()
            depth = needle_depths(context, [context.index(NEEDLE.strip())], count_tokens)[0]
            tags = {"depth": depth}
            asked = Question("needle", QUESTION, (GOLD,), max_new_tokens=self.max_new_tokens, tags=tags)
            yield Sample(f"{index:05d}", seed, context, (asked,))

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the answer has the sentence's end."""
        return contains(prediction, question.references)

    @cached_property
    def _essays(self) -> str:
        essays = "\n\n".join(row.text("context") for row in self.rows)
        if not essays.split():
            raise InvalidArgumentError(f"expected essays in {self.rows.name}, got no words")
        return essays


def _longest(essays: str, length_tokens: int, count_tokens: TokenCounter) -> str:
    """Returns as many words of the essays as leave room for the needle; essays that are too short are repeated."""
    room = length_tokens - count_tokens(NEEDLE)
    while count_tokens(essays) < room:
        essays += f"\n\n{essays}"
    words = [match.end() for match in re.finditer(r"\S+", essays)]
    fitting = bisect.bisect_right(words, room, key=lambda end: count_tokens(essays[:end]))
    return essays[: words[fitting - 1]] if fitting else ""


def _sentence_end(text: str, part: float) -> int:
    """Returns the index behind the last full stop in the first ``part`` (a fraction) of the text's characters."""
    return len(text) if part == 1 else text.rfind(".", 0, int(len(text) * part)) + 1
