"""Paired comparisons over contexts: is a press worse than the full cache, or is it chance? Pure functions of rows.

The accuracy of a cell is a mean over tasks of a mean over contexts (`summary`). Two cells are compared on the questions
that both answered: each context gives one number, the mean difference over its questions. The interval comes from a
bootstrap that draws contexts within each task; the p-value comes from flipping the signs of the contexts' differences,
which is exact however few contexts there are (all sign patterns, if they are fewer than the resamples). DESIGN.md says
why.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, install_command
from kvzip_press.leaderboard.analysis.summary import context_key, one_table, split, stratified_mean
from kvzip_press.leaderboard.rows.results import Row

SIGNIFICANCE_LEVEL = 0.05
N_RESAMPLES = 9999
_DETECTABLE = 1.960 + 0.842  # standard errors: found at 5 %, two-sided, in four of five repetitions

Key = tuple[tuple[str, int, str], str]
"""A context (its task first), and the id of a question about it."""

_Scores = dict[Key, float]
_Differences = list[NDArray[np.float64]]  # one array per task, one number per context


@dataclass(frozen=True)
class Comparison:
    """A press at one ratio against a reference, on the same questions.

    Attributes:
        press: The press's label.
        compression_ratio: Its ratio.
        reference: The label of what it is compared with.
        difference: Its accuracy minus the reference's, over the questions that both answered.
        interval: Holds 95 % of the bootstrapped differences; None if a task has a single context, or none was drawn.
        p_value: Two-sided, of a difference at least this large if press and reference were equally good.
        adjusted_p_value: The same, adjusted by Holm's method for all comparisons that were made together.
        n_contexts: How many contexts both answered.
        detectable: The smallest true difference that a comparison with contexts like these would find significant (at
            5 %, before any adjustment) in four of five repetitions; None if a task has a single context.
    """

    press: str
    compression_ratio: float
    reference: str
    difference: float
    interval: tuple[float, float] | None
    p_value: float
    adjusted_p_value: float
    n_contexts: int
    detectable: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant at 5 %, with all comparisons of the table counted."""
        return self.adjusted_p_value <= SIGNIFICANCE_LEVEL


def compare(
    rows: Iterable[Row], reference: str, *, seed: int = 0, n_resamples: int = N_RESAMPLES, intervals: bool = True
) -> list[Comparison]:
    """Compares every press at every ratio with the reference at the same ratio, or at 0 if that removes nothing.

    Cells that share no question with the reference are left out. The same rows give the same numbers, whatever their
    order and whichever other cells are there.

    Args:
        rows: Rows of one table; only those of one task to compare presses on that task.
        reference: A press's label.
        seed: Seed of the resampling.
        n_resamples: Number of bootstrap draws, and of sign patterns.
        intervals: Whether to draw intervals, which takes a third of the time; they are None if not.

    Raises:
        InvalidArgumentError: The rows are of several tables, or the reference is none of their presses.
        MissingDependencyError: scipy is absent.
    """
    cells = scores_of_cells(one_table(rows))
    ratios = {ratio for press, ratio in cells if press == reference}
    if cells and not ratios:
        raise InvalidArgumentError(f"expected one of {sorted({press for press, _ in cells})}, got {reference!r}")
    pairs = [
        (press, ratio, _differences(cells[press, ratio], cells.get((reference, 0.0 if ratios == {0.0} else ratio), {})))
        for press, ratio in cells
        if press != reference
    ]
    found = [
        _comparison(press, ratio, reference, differences, seed, n_resamples, intervals)
        for press, ratio, differences in pairs
        if differences
    ]
    adjusted = holm([comparison.p_value for comparison in found])
    return [replace(comparison, adjusted_p_value=p) for comparison, p in zip(found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's step-down adjustment, which keeps the chance of even one false mark below the level.

    The smallest of ``m`` values is multiplied by ``m``, the next by ``m - 1``, and so on; none becomes smaller than one
    before it, nor larger than 1.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(value) for value in adjusted]


def scores_of_cells(rows: Iterable[Row]) -> dict[tuple[str, float], _Scores]:
    """Returns the scores of each press and ratio, by context and question."""
    cells: dict[tuple[str, float], _Scores] = {}
    for row in rows:
        cells.setdefault((row.press, row.compression_ratio), {})[context_key(row), row.question_id] = row.score
    return cells


def _differences(scores: Mapping[Key, float], reference: Mapping[Key, float]) -> _Differences:
    """Returns, per task in a fixed order, the mean difference of each context's questions; empty if none is shared."""
    shared = sorted(scores.keys() & reference.keys())
    tasks = split(split(shared, lambda key: key[0]), lambda context: context[0][0][0])
    return [
        np.array([np.mean([scores[key] - reference[key] for key in context]) for context in task]) for task in tasks
    ]


def _comparison(
    press: str, ratio: float, reference: str, differences: _Differences, seed: int, n_resamples: int, intervals: bool
) -> Comparison:
    p_value = _p_value(differences, seed, n_resamples)
    _, error = stratified_mean([task.tolist() for task in differences])
    return Comparison(
        press=press,
        compression_ratio=ratio,
        reference=reference,
        difference=float(_mean(*differences)),
        interval=_interval(differences, seed, n_resamples) if intervals else None,
        p_value=p_value,
        adjusted_p_value=p_value,
        n_contexts=sum(len(task) for task in differences),
        detectable=None if error is None else _DETECTABLE * error,
    )


def _interval(differences: _Differences, seed: int, n_resamples: int) -> tuple[float, float] | None:
    if min(len(task) for task in differences) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = scipy_stats().bootstrap(
        tuple(differences), _mean, n_resamples=n_resamples, batch=1000, method="percentile", rng=rng
    )  # each sample is resampled from itself: one stratum per task
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _p_value(differences: _Differences, seed: int, n_resamples: int) -> float:
    """Returns the sign test's p-value, for all tasks in one sample, each context weighted as it is in the mean."""
    weighted = np.concatenate([task / (len(task) * len(differences)) for task in differences])
    if len(weighted) < 2:
        return 1.0  # both sign patterns are equally far from zero
    tested = scipy_stats().permutation_test(
        (weighted,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(tested.pvalue)


def _mean(*tasks: NDArray[np.float64], axis: int = -1) -> Any:
    return sum(np.mean(task, axis=axis) for task in tasks) / len(tasks)


def scipy_stats() -> Any:
    """Returns the module.

    Raises:
        MissingDependencyError: scipy is absent.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingDependencyError(f"comparing presses needs scipy: {install_command('leaderboard')}") from error
    return stats
