"""Ratios at which nothing tells the presses apart: one test for all presses of a ratio. Pure functions of rows.

If the presses were equally good, each could have had the scores of any other on the same context. So the range of their
accuracies is compared with that after shuffling the presses within each context, which is exact for few contexts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip_press.leaderboard.analysis.statistics import SIGNIFICANCE_LEVEL, Key, scipy_stats, scores_of_cells
from kvzip_press.leaderboard.analysis.summary import one_table, split
from kvzip_press.leaderboard.rows.results import Row

_N_RESAMPLES = 999
_SAME = 1e-9  # sums of the same numbers in another order


@dataclass(frozen=True)
class Tie:
    """A ratio at which the presses could not be told apart.

    Attributes:
        compression_ratio: The ratio.
        lowest: The lowest accuracy of a press there, over the questions that all presses answered.
        highest: The highest.
        n_contexts: How many contexts these questions are about.
        is_undecidable: Whether so few contexts could not have told the presses apart, however much they differ.
    """

    compression_ratio: float
    lowest: float
    highest: float
    n_contexts: int
    is_undecidable: bool

    def __str__(self) -> str:
        at = f"At {self.compression_ratio:g} removed"
        contexts = f"{self.n_contexts} context{'s' * (self.n_contexts != 1)}"
        between = f"accuracies from {self.lowest:.2f} to {self.highest:.2f}"
        if self.is_undecidable:
            return f"{at} {contexts} cannot tell the presses apart: {between} may be chance. More contexts could."
        if self.highest - self.lowest < _SAME:
            return f"{at} nothing tells the presses apart: all have an accuracy of {self.highest:.2f} on {contexts}."
        return f"{at} nothing tells the presses apart beyond chance: {between} on {contexts}."


def ties(rows: Iterable[Row], *, seed: int = 0, n_resamples: int = _N_RESAMPLES) -> list[Tie]:
    """Returns the ratios at which the presses do not differ at 5 %, from small to large.

    Either they are equally good there (the task is too easy, or too hard for all of them), or the contexts are too few.
    Ratio 0, ratios with a single press and those without a question that all presses answered are left out.

    Args:
        rows: Rows of one table.
        seed: Seed of the shuffles.
        n_resamples: Number of shuffles; all of them, if there are fewer.

    Raises:
        InvalidArgumentError: The rows are of several tables.
        MissingDependencyError: scipy is absent.
    """
    cells = scores_of_cells(one_table(rows))
    ratios = sorted({ratio for _, ratio in cells if ratio > 0})
    found = (
        _tie(ratio, [scores for (_, other), scores in cells.items() if other == ratio], seed, n_resamples)
        for ratio in ratios
    )
    return [tie for tie in found if tie is not None]


def _tie(ratio: float, presses: Sequence[Mapping[Key, float]], seed: int, n_resamples: int) -> Tie | None:
    shared = sorted(reduce(lambda keys, scores: keys & scores.keys(), presses[1:], set(presses[0])))
    if len(presses) < 2 or not shared:
        return None
    parts = _parts(presses, shared)
    means = sum(parts)
    p_value, least = (1.0, 1.0) if len(parts) < 2 else _p_values(parts, seed, n_resamples)
    if p_value <= SIGNIFICANCE_LEVEL:
        return None
    lowest, highest = float(np.min(means)), float(np.max(means))
    is_undecidable = least > SIGNIFICANCE_LEVEL and highest - lowest >= _SAME
    return Tie(ratio, lowest, highest, len(parts), is_undecidable)


def _parts(presses: Sequence[Mapping[Key, float]], shared: Sequence[Key]) -> list[NDArray[np.float64]]:
    """Returns what each context adds to the presses' accuracies: an array over the presses."""
    tasks = split(split(shared, lambda key: key[0]), lambda context: context[0][0][0])
    return [
        np.array([np.mean([scores[key] for key in context]) for scores in presses]) / (len(task) * len(tasks))
        for task in tasks
        for context in task
    ]


def _p_values(parts: Sequence[NDArray[np.float64]], seed: int, n_resamples: int) -> tuple[float, float]:
    """Returns the p-value of the range of the sums, and the least that any scores of this kind could have had.

    The range is largest where one press has the best score of every context, and another the worst.
    """

    def range_of_sums(*contexts: NDArray[np.float64], axis: int = -1) -> Any:
        return np.ptp(sum(contexts), axis=axis)

    tested = scipy_stats().permutation_test(
        tuple(parts),
        range_of_sums,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=n_resamples,
        batch=100,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    widest = range_of_sums(*(np.sort(part) for part in parts))
    return float(tested.pvalue), float(np.mean(tested.null_distribution >= widest - _SAME))
