"""Pareto pictures: accuracy against a cost, with one line per press over its ratios."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvzip_press.leaderboard.analysis.summary import Cell, find_full
from kvzip_press.leaderboard.pictures.canvas import Look, canvas, looks, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_GAP = 0.055  # smallest distance between two labels, in units of accuracy


@dataclass(frozen=True)
class Cost:
    """A cost that accuracy is drawn against.

    Attributes:
        label: The axis label.
        value: Returns a cell's cost; None if it was not measured.
        halves: Whether the axis is logarithmic with fractions as ticks: 1/8, 1/4, 1/2, 1.
    """

    label: str
    value: Callable[[Cell], float | None]
    halves: bool = False


KEPT = Cost("kept fraction of key/value pairs (measured)", lambda cell: cell.kept_fraction, halves=True)
TIME = Cost("ms a token of an answer, reading the question included", lambda cell: cell.ms_per_token)


def save_pareto(cells: Sequence[Cell], path: str | os.PathLike[str], title: str = "", *, cost: Cost = KEPT) -> None:
    """Draws the cells and saves the picture in the format of the path's suffix.

    The full cache is a horizontal line, for reference; presses are lines over their ratios, labelled at their ends,
    with one standard error up and down where it is known.

    Args:
        cells: From `summarise`; may be empty. Those whose cost was not measured are left out.
        path: The file; its directory is created if it does not exist.
        title: Shown above the axes.
        cost: What accuracy is drawn against.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    known = [cell for cell in cells if cost.value(cell) is not None]
    with canvas(path, title, (8, 5)) as axes:
        _frame(axes, cost, empty=not known)
        _draw(axes, known, cost)


def _frame(axes: "Axes", cost: Cost, *, empty: bool) -> None:
    axes.set(ylim=(-0.03, 1.03), xlabel=cost.label, ylabel="accuracy")
    if cost.halves:
        axes.set_xscale("log", base=2)
        if empty:
            axes.set_xlim(1 / 32, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"1/{1 / value:.0f}" if value < 1 else f"{value:.0f}")
    axes.grid(color="#dddddd", linewidth=0.6)
    if empty:
        axes.text(0.5, 0.5, "no rows", ha="center", va="center", color="#666666", transform=axes.transAxes)


def _draw(axes: "Axes", cells: Sequence[Cell], cost: Cost) -> None:
    full = find_full(cells)
    ends = []
    for press, look in looks((cell.press for cell in cells), full).items():
        points = sorted((cell for cell in cells if cell.press == press), key=lambda cell: -cell.compression_ratio)
        if press == full:
            axes.axhline(points[-1].accuracy, color=look.colour, linestyle="--", linewidth=1)
        axes.errorbar(
            [cost.value(point) or 0.0 for point in points],
            [point.accuracy for point in points],
            yerr=[point.standard_error or 0.0 for point in points],
            color=look.colour, marker=look.marker, markersize=6, linewidth=1.8, elinewidth=0.8, capsize=2,
        )  # fmt: skip
        ends.append((points[-1], look))
    _label(axes, [(cell, look, cost.value(cell) or 0.0) for cell, look in ends])


def _label(axes: "Axes", ends: Sequence[tuple[Cell, Look, float]]) -> None:
    """Writes each press's name on the right, at the height of its last point or as close to it as fits."""
    ends = sorted(ends, key=lambda end: end[0].accuracy)
    heights = spread([cell.accuracy for cell, _, _ in ends], _LABEL_GAP, highest=1.0)
    for (cell, look, place), height in zip(ends, heights, strict=True):
        axes.annotate(
            shown(cell.press), (place, cell.accuracy), color=look.colour, fontweight="bold", annotation_clip=False,
            xytext=(1.03, height), textcoords=axes.get_yaxis_transform(), ha="left", va="center",
            parse_math=False, arrowprops={"arrowstyle": "-", "color": look.colour, "linewidth": 0.5, "alpha": 0.7},
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float, highest: float) -> list[float]:
    """Moves sorted heights at least `gap` apart: upwards, then down again where that exceeds `highest`."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    limit = highest
    for place in reversed(range(len(found))):
        found[place] = min(found[place], limit)
        limit = found[place] - gap
    return found
