"""One number a press: the area under its curve of accuracy over what is kept, and its score over the full cache's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.summary import Cell, find_full, split

Point = tuple[float, float]
"""A measured kept fraction, and the accuracy there."""


@dataclass(frozen=True)
class Areas:
    """Mean accuracies over a range of kept fractions.

    Attributes:
        low: Where the range begins.
        high: Where it ends.
        areas: The area of each press over the range, divided by the range's length, so in [0, 1]; None for a press
            that was not measured over all of it.
    """

    low: float
    high: float
    areas: dict[str, float | None]


def areas_under_curves(cells: Sequence[Cell]) -> Areas | None:
    """The area under each press's curve, over the range that all presses with all ratios were measured on.

    A curve goes straight from each measured point to the next, and to the full cache, where there is one: a press that
    removes nothing is the full cache. Nothing is extrapolated: the range begins at the largest of the presses' least
    kept fractions and ends at the least of their largest. None where it is empty.

    Args:
        cells: Of one table, all tasks or one of them. Those whose kept fraction was not measured are left out.
    """
    curves = _curves([cell for cell in cells if cell.kept_fraction is not None])
    most = max((len(points) for points in curves.values()), default=0)
    whole = [points for points in curves.values() if len(points) == most]
    low = max((points[0][0] for points in whole), default=math.nan)
    high = min((points[-1][0] for points in whole), default=math.nan)
    if not low < high:
        return None
    return Areas(low, high, {press: area_under_curve(points, low, high) for press, points in curves.items()})


def area_under_curve(points: Sequence[Point], low: float, high: float) -> float | None:
    """The mean height of the curve through the points between `low` and `high`, by trapezoids.

    Args:
        points: Sorted, no two at the same place.
        low: Where the range begins.
        high: Where it ends.

    Returns:
        None where the points do not reach over the range.

    Raises:
        InvalidArgumentError: An empty range, or points that are not sorted.
    """
    places = np.array([place for place, _ in points])
    if not low < high or (np.diff(places) <= 0).any():
        raise InvalidArgumentError(f"expected low < high and rising places, got {low}, {high} and {places.tolist()}")
    if not len(points) or places[0] > low or places[-1] < high:
        return None
    heights = np.array([height for _, height in points])
    inside = (places > low) & (places < high)
    x = np.concatenate([[low], places[inside], [high]])
    y = np.interp(x, places, heights)
    return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) / (high - low))


def relative_performance(task_cells: Iterable[Cell]) -> dict[tuple[str, float], float]:
    """For each press and ratio, the mean over tasks of its score over the full cache's.

    Tasks at which the full cache scores 0 are left out, as are presses and ratios that have no other task. Empty where
    there is no full cache.

    Args:
        task_cells: Of one table, from `summarise_tasks`.
    """
    cells = list(task_cells)
    full = find_full(cells)
    best = {cell.task: cell.accuracy for cell in cells if cell.press == full and cell.accuracy > 0}
    known = [cell for cell in cells if cell.task in best]
    return {
        (group[0].press, group[0].compression_ratio): float(
            np.mean([cell.accuracy / best[cell.task] for cell in group])
        )
        for group in split(known, lambda cell: (cell.press, cell.compression_ratio))
    }


def _curves(cells: Sequence[Cell]) -> dict[str, list[Point]]:
    """The points of each press but the full cache, whose point ends every curve; of equal places the better one."""
    full = find_full(cells)
    ends = [(1.0, cell.accuracy) for cell in cells if cell.press == full]
    return {
        press[0].press: sorted(dict(sorted([*_points(press), *ends])).items())
        for press in split((cell for cell in cells if cell.press != full), lambda cell: cell.press)
    }


def _points(cells: Iterable[Cell]) -> list[Point]:
    return [(cell.kept_fraction, cell.accuracy) for cell in cells if cell.kept_fraction is not None]
