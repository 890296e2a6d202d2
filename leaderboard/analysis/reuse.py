"""What many questions about one context cost: compressed once, kept whole, or read anew each time.

Pure functions of rows. Seconds are those that rows measured: the prefill that all presses share, scoring and evicting,
and a question's share of the batch that was answered at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.ratios import ratio_text
from kvzip_press.leaderboard.analysis.summary import context_key, find_full, one_table, split
from kvzip_press.leaderboard.rows.results import Row

Contexts = Mapping[tuple[str, int, str], Sequence[Row]]
"""The rows of each context, by `context_key`."""

QUESTIONS = (1, 8, 64, 512)
NO_REUSE = "no cache kept"


@dataclass(frozen=True)
class Reuse:
    """Seconds of a press at a ratio, means over the contexts that it and the full cache both have.

    Attributes:
        press: Its label.
        compression_ratio: Fraction removed.
        n_contexts: Contexts behind the numbers.
        prefill_seconds: Reading the context once.
        compress_seconds: Scoring and evicting once; 0 for the full cache, of which a run only makes a copy of its own.
        answer_seconds: Reading and answering one question.
        full_answer_seconds: The same from the full cache.
    """

    press: str
    compression_ratio: float
    n_contexts: int
    prefill_seconds: float
    compress_seconds: float
    answer_seconds: float
    full_answer_seconds: float

    def total(self, n_questions: int) -> float:
        """Seconds of compressing the context once and answering that many questions."""
        return self.prefill_seconds + self.compress_seconds + n_questions * self.answer_seconds

    def full_total(self, n_questions: int) -> float:
        """Seconds of keeping the whole cache and answering from it."""
        return self.prefill_seconds + n_questions * self.full_answer_seconds

    def anew_total(self, n_questions: int) -> float:
        """Seconds of reading the context anew for each question."""
        return n_questions * (self.prefill_seconds + self.full_answer_seconds)

    @property
    def break_even(self) -> int | None:
        """Questions from which on it takes less time than the full cache; None if an answer is not faster."""
        return _first(self.compress_seconds, self.full_answer_seconds - self.answer_seconds)

    @property
    def break_even_anew(self) -> int | None:
        """Questions from which on it takes less time than reading the context anew; None if it never does."""
        gained = self.prefill_seconds + self.full_answer_seconds - self.answer_seconds
        return _first(self.prefill_seconds + self.compress_seconds, gained)


def _first(cost: float, gained: float) -> int | None:
    """Returns the least number of questions, at least 1, that gain more than the cost."""
    return max(1, math.floor(round(cost / gained, 9)) + 1) if gained > 0 else None  # as many as cost only draw level


def reuses(rows: Iterable[Row]) -> list[Reuse]:
    """Returns what each press at each ratio costs; first the full cache itself. Empty without a full cache or times.

    Args:
        rows: Rows of one table, for all tasks or for one.

    Raises:
        InvalidArgumentError: The rows are of several tables.
    """
    rows = one_table(rows)
    full = find_full(rows)
    cells = {
        (cell[0].press, cell[0].compression_ratio): {context_key(group[0]): group for group in split(cell, context_key)}
        for cell in split(rows, lambda row: (row.press, row.compression_ratio))
    }
    whole: Contexts = {} if full is None else cells[full, 0.0]
    found = (_reuse(press, ratio, contexts, whole) for (press, ratio), contexts in cells.items())
    return sorted((one for one in found if one is not None), key=lambda one: one.press != full)


def _reuse(press: str, ratio: float, contexts: Contexts, whole: Contexts) -> Reuse | None:
    """Compares a cell with the full cache on the questions that both answered."""
    pairs = [_shared(contexts[key], whole[key]) for key in contexts if key in whole]
    timed = [(mine, theirs) for mine, theirs in pairs if mine and all(map(_is_timed, [*mine, *theirs]))]
    if not timed:
        return None

    def mean(value: Callable[[Row], float | None], side: int) -> float:
        return statistics.fmean(statistics.fmean(value(row) or 0.0 for row in pair[side]) for pair in timed)

    return Reuse(
        press,
        ratio,
        len(timed),
        mean(lambda row: row.prefill_seconds, 0),
        0.0 if contexts is whole else mean(lambda row: (row.score_seconds or 0.0) + (row.evict_seconds or 0.0), 0),
        mean(lambda row: row.answer_seconds, 0),
        mean(lambda row: row.answer_seconds, 1),
    )


def _shared(mine: Sequence[Row], theirs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    asked = {row.question_id for row in mine} & {row.question_id for row in theirs}
    return [row for row in mine if row.question_id in asked], [row for row in theirs if row.question_id in asked]


def _is_timed(row: Row) -> bool:
    """Whether a row has all its times; without a context there is no prefill to share."""
    times = (row.prefill_seconds, row.score_seconds, row.evict_seconds, row.answer_seconds)
    return all(time is not None for time in times) and row.prefill_seconds != 0


def reuse_lines(found: Sequence[Reuse], questions: Sequence[int] = QUESTIONS) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the lines of the table: seconds in all for numbers of questions, and where that breaks even.

    Args:
        found: From `reuses`, the full cache first.
        questions: The numbers of questions, rising.

    Raises:
        InvalidArgumentError: A number is below 1, or they do not rise.
    """
    if not questions or questions[0] < 1 or any(one >= other for one, other in pairwise(questions)):
        raise InvalidArgumentError(f"expected rising numbers of questions from 1 on, got {list(questions)!r:.80}")
    head = ["seconds in all", "removed", "once", "a question"]
    head += [f"{n} question{'s' * (n != 1)}" for n in questions]
    head += ["beats full cache from", "beats reading anew from"]
    lines = []
    for one in found:
        once = one.prefill_seconds + one.compress_seconds
        totals = [_seconds(one.total(n)) for n in questions]
        ends = ["-" if one is found[0] else _from(one.break_even), _from(one.break_even_anew)]
        lines.append(
            [one.press, ratio_text(one.compression_ratio), _seconds(once), _seconds(one.answer_seconds), *totals, *ends]
        )
    if found:
        anew = [_seconds(found[0].anew_total(n)) for n in questions]
        each = found[0].prefill_seconds + found[0].full_answer_seconds
        lines.insert(0, [NO_REUSE, "0.00", "0", _seconds(each), *anew, "-", "-"])
    return head, lines


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _from(n_questions: int | None) -> str:
    return "never" if n_questions is None else str(n_questions)
