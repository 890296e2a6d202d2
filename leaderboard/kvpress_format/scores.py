"""Compares scores with what they were made of: with predictions, by the metric, and with metrics.json."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, MissingDependencyError
from kvzip_press.leaderboard.analysis.summary import split
from kvzip_press.leaderboard.kvpress_format.layout import METRICS, OF_KVPRESS, PREDICTIONS, subset_of
from kvzip_press.leaderboard.metrics.originals import ruler_all, ruler_any
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.samples.task import Question, version_of
from kvzip_press.leaderboard.tasks import TASKS, get_task

logger = logging.getLogger(__name__)

Score = Callable[[str, Sequence[str], str], float]
"""Takes a prediction, its references and the name of its task or subset; returns a score in [0, 1]."""

_RULER = "ruler"
_TWO_DECIMALS = 0.0101  # of metrics.json, rounded either way
_SAME = 1e-9


def scorer_of(dataset: str, score: Score | None, path: Path) -> Score:
    """Returns the metric for results that kvpress wrote.

    Raises:
        InvalidArgumentError: It is not known.
    """
    if score is not None:
        return score
    if dataset == _RULER:
        return _ruler
    raise InvalidArgumentError(
        f"{path}: expected results of ruler, or a metric (score=), got results of {dataset!r:.80} without one"
    )


def _ruler(prediction: str, references: Sequence[str], subset: str) -> float:
    return (ruler_any if subset.startswith("qa") else ruler_all)(prediction, references)


def check_means(rows: Sequence[Row], metrics: Mapping[str, Any], path: Path, *, all_stated: bool) -> None:
    """Checks that the scores agree with the folder's: a wrong metric would give a wrong table.

    Raises:
        InvalidArgumentError: They do not.
    """
    for task in split(rows, subset_of):
        stated = metrics.get(subset_of(task[0]))
        if stated is None and not all_stated:
            continue
        value = next(iter(stated.values()), None) if isinstance(stated, dict) else stated
        mean = 100 * statistics.fmean(row.score for row in task)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value - mean) <= _TWO_DECIMALS:
            raise InvalidArgumentError(
                f"{path / METRICS}: expected {mean:.2f} for {subset_of(task[0])!r:.80}, got {value!r:.40}"
            )


def check_own(rows: Sequence[Row], path: Path, score: Score | None) -> None:
    """Checks that the scores of rows of ours are those of their predictions.

    A task that is not known here under its name, or was of another version, has no metric to compare with: a note says
    so.

    Raises:
        InvalidArgumentError: A score is not that of its prediction.
    """
    again: list[float | None]
    try:
        again = [_score_of(row, score) for row in rows]
    except MissingDependencyError as error:
        logger.warning("%s: scores are not compared with the predictions: %s", path, error)
        return
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, KVzipPressError):
            raise
        raise InvalidArgumentError(
            f"{path / PREDICTIONS}: expected what the metric of {rows[0].task!r:.80} needs, got {error!r:.200}"
        ) from error
    for number, (row, found) in enumerate(zip(rows, again, strict=True), start=1):
        if found is not None and abs(found - row.score) > _SAME:
            raise InvalidArgumentError(
                f"{path / PREDICTIONS}: expected the score {found:g} for the prediction of the {number}. row, got "
                f"{row.score:g}"
            )
    if None in again:
        logger.warning(
            "%s: scores are not compared with the predictions: the metric of the task %r in version %s is not known",
            path,
            rows[0].task,
            rows[0].task_version,
        )


def _score_of(row: Row, score: Score | None) -> float | None:
    if row.task == _RULER and OF_KVPRESS in row.provenance and score is None:  # kvpress asked, in whatever version
        return _ruler(row.prediction, row.references, subset_of(row))
    if row.task in TASKS:
        task = get_task(row.task)
        if version_of(task) == row.task_version:
            return task.score(row.prediction, Question(row.question_id, "", row.references, tags=row.tags))
    return None if score is None else score(row.prediction, row.references, subset_of(row))
