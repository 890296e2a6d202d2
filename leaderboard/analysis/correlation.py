"""How far the ranking of presses on one model foretells that on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.statistics import scipy_stats
from kvzip_press.leaderboard.analysis.summary import Cell

LEAST_PRESSES = 3


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of the presses' accuracies on two models.

    Attributes:
        by_ratio: Removed fraction -> the correlation over the presses that both have there; NaN where all of one tie.
        n_presses: Removed fraction -> how many presses that were.
    """

    by_ratio: dict[float, float]
    n_presses: dict[float, int]

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


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    if any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return float("nan")
    return float(scipy_stats().spearmanr(*zip(*pairs, strict=True)).statistic)
