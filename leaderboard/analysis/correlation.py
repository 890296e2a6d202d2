"""How far the ranking of presses on one model foretells that on another."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.statistics import scipy_stats
from kvzip_press.leaderboard.analysis.summary import Cell, context_key, split, summarise
from kvzip_press.leaderboard.rows.results import Row

LEAST_PRESSES = 3


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of the presses' accuracies on two models.

    Attributes:
        by_ratio: Removed fraction -> the correlation over the presses that both have there; NaN where all of one tie.
        n_presses: Removed fraction -> how many presses that were.
        interval: Holds 95 % of the means over ratios when contexts are drawn anew on both models, see
            `correlation_of_rows`; None where that was not asked for, or a task has a single context. It is about these
            presses: others may rank otherwise.
    """

    by_ratio: dict[float, float]
    n_presses: dict[float, int]
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """The mean over ratios, without those that have none."""
        known = [value for value in self.by_ratio.values() if value == value]  # noqa: PLR0124  # not NaN
        return sum(known) / len(known) if known else float("nan")


def rank_correlation(mine: Sequence[Cell], theirs: Sequence[Cell]) -> RankCorrelation:
    """Ranks the presses of each ratio by accuracy on both models, and correlates the ranks.

    Ratio by ratio, because over all ratios together any two models agree: more removed is worse.

    Args:
        mine: Cells of one model, from `summarise`.
        theirs: Cells of another.

    Raises:
        InvalidArgumentError: At no ratio above 0 do both have three presses of the same names.
        MissingDependencyError: scipy is absent.
    """
    first, second = (
        {(cell.compression_ratio, cell.press): cell.accuracy for cell in cells} for cells in (mine, theirs)
    )
    shared = [key for key in first if key in second and key[0] > 0]
    pairs: dict[float, list[tuple[float, float]]] = {}
    for key in shared:
        pairs.setdefault(key[0], []).append((first[key], second[key]))
    pairs = {ratio: found for ratio, found in sorted(pairs.items()) if len(found) >= LEAST_PRESSES}
    if not pairs:
        raise InvalidArgumentError(
            f"expected {LEAST_PRESSES} presses or more with the same label and ratio in both runs, got "
            f"{sorted({press for _, press in shared})}"
        )
    return RankCorrelation(
        {ratio: _spearman(found) for ratio, found in pairs.items()},
        {ratio: len(found) for ratio, found in pairs.items()},
    )


def correlation_of_rows(
    mine: Iterable[Row], theirs: Iterable[Row], *, seed: int = 0, n_resamples: int = 2000
) -> RankCorrelation:
    """Does what `rank_correlation` does for the rows of two tables, and gives the correlation's interval.

    The interval is a bootstrap of the accuracies: contexts of each task are drawn with replacement, the same ones for
    all presses of a model and each model's own, and the presses ranked again.

    Args:
        mine: Rows of one table.
        theirs: Rows of another model's.
        seed: Seed of the draws.
        n_resamples: Number of draws.

    Raises:
        InvalidArgumentError: As `rank_correlation` and `summarise` raise.
        MissingDependencyError: scipy is absent.
    """
    first, second = list(mine), list(theirs)
    found = rank_correlation(summarise(first), summarise(second))
    rng = np.random.default_rng(seed)
    drawn = [_drawn_accuracies(rows, rng, n_resamples) for rows in (first, second)]
    if None in drawn:
        return found
    (one, of_one), (other, of_other) = cast("list[_Drawn]", drawn)
    by_ratio = []
    for ratio in found.by_ratio:
        presses = [press for at, press in of_one if at == ratio and (at, press) in of_other]
        places = [[of_one[ratio, press] for press in presses], [of_other[ratio, press] for press in presses]]
        by_ratio.append(_correlated(one[:, places[0]], other[:, places[1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw in which all tie at every ratio has no mean
        means = np.nanmean(by_ratio, axis=0)
    low, high = np.nanpercentile(means, (2.5, 97.5)) if np.isfinite(means).any() else (np.nan, np.nan)
    return replace(found, interval=(float(low), float(high)) if np.isfinite(low) else None)


_Drawn = tuple[NDArray[np.float64], dict[tuple[float, str], int]]


def _drawn_accuracies(rows: Sequence[Row], rng: np.random.Generator, n_resamples: int) -> _Drawn | None:
    """Returns accuracies ``[draw, cell]``, and each cell's place; None if a task has a single context."""
    cells = {key: place for place, key in enumerate(dict.fromkeys((row.compression_ratio, row.press) for row in rows))}
    tasks = split(rows, lambda row: row.task)
    total = np.zeros((n_resamples, len(cells)))
    for task in tasks:
        contexts = split(task, context_key)
        if len(contexts) < 2:
            return None
        scores = np.full((len(contexts), len(cells)), np.nan)
        for place, context in enumerate(contexts):
            for group in split(context, lambda row: (row.compression_ratio, row.press)):
                cell = cells[group[0].compression_ratio, group[0].press]
                scores[place, cell] = np.mean([row.score for row in group])
        weights = rng.multinomial(len(contexts), np.full(len(contexts), 1 / len(contexts)), size=n_resamples)
        known = ~np.isnan(scores)
        n_known = weights @ known
        total += np.where(n_known > 0, weights @ np.where(known, scores, 0.0) / np.maximum(n_known, 1), np.nan)
    return total / len(tasks), cells


def _correlated(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns Spearman's correlation of each draw ``[draw, press]``; NaN where all of one side tie."""
    ranks = [scipy_stats().rankdata(side, axis=1, nan_policy="propagate") for side in (one, other)]
    centred = [side - side.mean(axis=1, keepdims=True) for side in ranks]
    norm = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    products: NDArray[np.float64] = (centred[0] * centred[1]).sum(axis=1)
    return np.where(norm > 0, products / np.where(norm > 0, norm, 1.0), np.nan)


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    if any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return float("nan")
    return float(scipy_stats().spearmanr(*zip(*pairs, strict=True)).statistic)
