"""Summary numbers: areas under each press's accuracy, and scores relative to those of the full cache."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.summary import Cell, find_full, split

Point = tuple[float, float]
"""A measured kept fraction, or the logarithm of measured bytes, and the accuracy there."""

_AS_FAR = 0.9  # of the farthest measurement: presses at one ratio differ in what they protect, and so in their places


@dataclass(frozen=True)
class Areas:
    """Mean accuracies over a range of kept fractions, or of resident bytes.

    Attributes:
        low: Where the range begins.
        high: Where it ends.
        areas: The area of each press over the range, divided by the range's length, so in [0, 1]; None for a press
            that was not measured over all of it.
        ends: Where a press was measured last, of presses that were measured less far than others (storages of few bits
            have few bytes even with all pairs). From there on a curve is a straight line to the full cache, and an area
            of it tells of that line more than of the press.
    """

    low: float
    high: float
    areas: dict[str, float | None]
    ends: dict[str, float] = field(default_factory=dict)


def areas_under_curves(cells: Sequence[Cell]) -> Areas | None:
    """Returns the area under each press's curve, over the range shared by all presses that have every ratio.

    A curve joins measured points by straight lines and ends at the full cache, if there is one: a press that removes
    nothing is the full cache. Nothing is extrapolated: the range begins at the largest of the presses' smallest kept
    fractions and ends at the smallest of their largest. None if that range is empty, or if no press has two amounts.

    Args:
        cells: Cells of one table, for all tasks or for one. Those without a measured kept fraction are left out.
    """
    known = [cell for cell in cells if cell.kept_fraction is not None]
    ends = [(1.0, cell.accuracy) for cell in cells if cell.press == find_full(cells)]
    found = _areas(_curves(known, lambda cell: cell.kept_fraction or 0.0, ends), _n_ratios(known))
    return None if found is None else replace(found, ends=_ends(known, lambda cell: cell.kept_fraction or 0.0))


def areas_over_bytes(cells: Sequence[Cell]) -> Areas | None:
    """Returns the area under each press's accuracy over its resident bytes, on a logarithmic axis.

    Halving a cache counts the same wherever it begins, and storages in fewer bits compete with eviction at equal bytes.
    Every curve ends at the full cache's bytes. Otherwise as `areas_under_curves`, with ``low`` and ``high`` in bytes.

    Args:
        cells: Cells of one table, for all tasks or for one. Those without measured bytes are left out.
    """
    full, known = find_full(cells), [cell for cell in cells if cell.resident_bytes]
    ends = [(_log2(cell), cell.accuracy) for cell in known if cell.press == full]
    found = _areas(_curves(known, _log2, ends), _n_ratios(known))
    if found is None:
        return None
    return Areas(2**found.low, 2**found.high, found.areas, _ends(known, lambda cell: cell.resident_bytes or 0.0))


def _ends(cells: Sequence[Cell], place: Callable[[Cell], float]) -> dict[str, float]:
    """Returns the last place of each press that was measured less far than the one that was measured farthest."""
    full = find_full(cells)
    presses = split((cell for cell in cells if cell.press != full), lambda cell: cell.press)
    ends = {press[0].press: max(map(place, press)) for press in presses}
    return {press: end for press, end in ends.items() if end < _AS_FAR * max(ends.values())}


def _n_ratios(cells: Sequence[Cell]) -> Counter[str]:
    return Counter(cell.press for cell in cells)


def _areas(curves: dict[str, list[Point]], n_ratios: Counter[str]) -> Areas | None:
    """Returns the areas; by ratios, since a press that removed nothing shares its point with the full cache."""
    most = max((n_ratios[press] for press in curves), default=0)
    if most < 2:  # budgets, say, each of which is a row of its own: a line to the full cache would be invented
        return None
    whole = [points for press, points in curves.items() if n_ratios[press] == most]
    low = max((points[0][0] for points in whole), default=math.nan)
    high = min((points[-1][0] for points in whole), default=math.nan)
    if not low < high:
        return None
    return Areas(low, high, {press: area_under_curve(points, low, high) for press, points in curves.items()})


def area_under_curve(points: Sequence[Point], low: float, high: float) -> float | None:
    """Returns the mean height between `low` and `high` of the curve through the points, by trapezoids.

    Args:
        points: Sorted, no two at the same place.
        low: Where the range begins.
        high: Where it ends.

    Returns:
        The mean height, or None if the points do not span the range.

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
    """Returns, for each press and ratio, the mean over tasks of its score divided by the full cache's.

    Tasks on which the full cache scores 0 are left out, as are presses and ratios that have no other task. Empty if
    there is no full cache.

    Args:
        task_cells: Cells of one table, from `summarise_tasks`.
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


def _log2(cell: Cell) -> float:
    return math.log2(cell.resident_bytes or 1)


def _curves(cells: Sequence[Cell], place: Callable[[Cell], float], ends: Sequence[Point]) -> dict[str, list[Point]]:
    """Returns the points of each press but the full cache, whose point ends every curve; the best at equal places."""
    full = find_full(cells)
    return {
        press[0].press: sorted(dict(sorted([*((place(cell), cell.accuracy) for cell in press), *ends])).items())
        for press in split((cell for cell in cells if cell.press != full), lambda cell: cell.press)
    }
