"""Pareto pictures: accuracy against a cost, with one line per press over its ratios."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvzip_press.leaderboard.analysis.curves import areas_under_curves
from kvzip_press.leaderboard.analysis.looks import looks
from kvzip_press.leaderboard.analysis.summary import Cell, find_full
from kvzip_press.leaderboard.pictures.canvas import SIGNS, canvas, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES_A_COLUMN = 40


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


def _share_of_bytes(cell: Cell) -> float | None:
    return 1 / cell.compression if cell.compression else None


KEPT = Cost("kept fraction of key/value pairs (measured)", lambda cell: cell.kept_fraction, halves=True)
BYTES = Cost("bytes of the cache, of those of the full one (measured)", _share_of_bytes, halves=True)
TIME = Cost("ms a token of an answer, reading the question included", lambda cell: cell.ms_per_token)


def save_pareto(cells: Sequence[Cell], path: str | os.PathLike[str], title: str = "", *, cost: Cost = KEPT) -> None:
    """Draws the cells and saves the picture in the format of the path's suffix.

    The full cache is a horizontal line, for reference; presses are lines over their ratios, named beside the axes in
    the order of the areas under them, with one standard error up and down where it is known.

    Args:
        cells: From `summarise`; may be empty. Those whose cost was not measured are left out.
        path: The file; its directory is created if it does not exist.
        title: Shown above the axes.
        cost: What accuracy is drawn against.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    known = [cell for cell in cells if cost.value(cell) is not None]
    n_names = min(len({cell.press for cell in known}), _NAMES_A_COLUMN)
    with canvas(path, title, (9, max(5.0, 1.0 + 0.3 * n_names))) as axes:
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
    full, drawn = find_full(cells), {}
    for press, look in looks((cell.press for cell in cells), full).items():
        points = sorted((cell for cell in cells if cell.press == press), key=lambda cell: -cell.compression_ratio)
        line: Any = (0, look.line) if look.line else "-"
        if press == full:
            axes.axhline(points[-1].accuracy, color=look.colours[0], linestyle=line, linewidth=1)
        drawn[press], *_ = axes.errorbar(
            [cost.value(point) or 0.0 for point in points],
            [point.accuracy for point in points],
            yerr=[point.standard_error or 0.0 for point in points],
            color=look.colours[0], linestyle=line, marker=SIGNS[look.marker], markersize=6, linewidth=1.8,
            elinewidth=0.8, capsize=2,
        )  # fmt: skip
    found = areas_under_curves(cells)
    areas = {} if found is None else {press: area or 0.0 for press, area in found.areas.items()}
    _name(axes, {press: drawn[press] for press in sorted(drawn, key=lambda press: -areas.get(press, 1.0))})


def _name(axes: "Axes", drawn: Mapping[str, Any]) -> None:
    """Writes the names in their order on the right of the axes, where no curve runs."""
    if not drawn:
        return
    legend = axes.legend(
        list(drawn.values()), [shown(press) for press in drawn], ncols=math.ceil(len(drawn) / _NAMES_A_COLUMN),
        loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, handlelength=3, labelspacing=0.7,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
