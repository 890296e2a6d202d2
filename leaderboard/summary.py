"""From rows to cells: what a table shows and a picture draws. Pure functions."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.results import Row

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One press at one ratio. Times are means over contexts, the answer's over questions.

    Attributes:
        press: Its label.
        compression_ratio: Fraction asked to be removed.
        n_questions: Answers behind the numbers.
        accuracy: Mean over the tasks of the mean over contexts of the mean over questions.
        standard_error: Of the accuracy, from the spread between contexts, as questions of one context are not
            independent; None where a task has a single context.
        kept_fraction: Measured.
        resident_bytes: Of the compressed cache.
        prefill_seconds: The forward that all presses share.
        compress_seconds: Scoring and evicting.
        answer_seconds: Reading a question and writing its answer.
    """

    press: str
    compression_ratio: float
    n_questions: int
    accuracy: float
    standard_error: float | None
    kept_fraction: float
    resident_bytes: float
    prefill_seconds: float
    compress_seconds: float
    answer_seconds: float


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """The cells of one run, presses in the order of their first row, ratios from small to large.

    Raises:
        InvalidArgumentError: Rows of several runs.
    """
    rows = list(rows)
    if len(runs := {row.run_id for row in rows}) > 1:
        raise InvalidArgumentError(f"expected rows of one run, got {len(runs)}: {', '.join(sorted(runs))}")
    order = {press: place for place, press in enumerate(dict.fromkeys(row.press for row in rows))}

    def place(row: Row) -> tuple[int, float]:
        return order[row.press], row.compression_ratio

    return [_cell(list(group)) for _, group in groupby(sorted(rows, key=place), key=place)]


def _cell(rows: Sequence[Row]) -> Cell:
    contexts = _split(rows, lambda row: (row.task, row.seed, row.sample_id))
    accuracy, standard_error = _accuracy(contexts)
    heads = [context[0] for context in contexts]  # what holds for a whole context is the same in all its rows
    return Cell(
        press=rows[0].press,
        compression_ratio=rows[0].compression_ratio,
        n_questions=len(rows),
        accuracy=accuracy,
        standard_error=standard_error,
        kept_fraction=statistics.fmean(row.kept_fraction for row in heads),
        resident_bytes=statistics.fmean(row.resident_bytes for row in heads),
        prefill_seconds=statistics.fmean(row.prefill_seconds for row in heads),
        compress_seconds=statistics.fmean(row.score_seconds + row.evict_seconds for row in heads),
        answer_seconds=statistics.fmean(row.answer_seconds for row in rows),
    )


def _accuracy(contexts: Sequence[Sequence[Row]]) -> tuple[float, float | None]:
    means, variances = [], []
    for task in _split(contexts, lambda context: context[0].task):
        scores = [statistics.fmean(row.score for row in context) for context in task]
        means.append(statistics.fmean(scores))
        variances.append(statistics.variance(scores) / len(scores) if len(scores) > 1 else math.nan)
    standard_error = math.sqrt(sum(variances)) / len(variances)
    return statistics.fmean(means), None if math.isnan(standard_error) else standard_error


def _split(items: Sequence[T], key: Callable[[T], object]) -> list[list[T]]:
    """The items in groups of equal key, in the order of each key's first item."""
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
