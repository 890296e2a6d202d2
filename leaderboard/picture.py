"""The Pareto picture: accuracy against the kept fraction, a line a press."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvzip_press.errors import MissingDependencyError
from kvzip_press.leaderboard.summary import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by people with any kind of colour vision; the markers say the same once more.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LABEL_GAP = 0.055  # least distance of two labels, in units of accuracy


def save_pareto(cells: Sequence[Cell], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the cells and save them (PNG, or what the suffix says).

    Presses that remove nothing are horizontal lines, for reference; the others are lines over their ratios, labelled at
    their ends, with one standard error up and down where it is known.

    Args:
        cells: From `summarise`; may be empty.
        path: The file; its directory is made where it is absent.
        title: Stands above.

    Raises:
        MissingDependencyError: Matplotlib is absent.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _frame(axes, title, empty=not cells)
    _draw(axes, cells)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _frame(axes: "Axes", title: str, *, empty: bool) -> None:
    axes.set(xlim=(0, 1.02), ylim=(-0.03, 1.03), title=title)
    axes.set_xlabel("kept fraction of key/value pairs (measured)")
    axes.set_ylabel("accuracy")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if empty:
        axes.text(0.5, 0.5, "no rows", ha="center", va="center", color="#666666")


def _draw(axes: "Axes", cells: Sequence[Cell]) -> None:
    ends = []
    for place, press in enumerate(dict.fromkeys(cell.press for cell in cells)):
        points = sorted((cell for cell in cells if cell.press == press), key=lambda cell: cell.kept_fraction)
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        if all(point.compression_ratio == 0 for point in points):
            colour = "#444444"
            axes.axhline(points[-1].accuracy, color=colour, linestyle="--", linewidth=1)
        axes.errorbar(
            [point.kept_fraction for point in points],
            [point.accuracy for point in points],
            yerr=[point.standard_error or 0.0 for point in points],
            color=colour, marker=marker, markersize=6, linewidth=1.8, elinewidth=0.8, capsize=2,
        )  # fmt: skip
        ends.append((points[-1], colour))
    _label(axes, ends)


def _label(axes: "Axes", ends: Sequence[tuple[Cell, str]]) -> None:
    """Write each press's name beside its last point, moved up where it would stand on another."""
    height = float("-inf")
    for cell, colour in sorted(ends, key=lambda end: end[0].accuracy):
        height = max(cell.accuracy, height + _LABEL_GAP)
        right = cell.kept_fraction < 0.8
        axes.annotate(
            f"{cell.press}", (cell.kept_fraction, cell.accuracy), color=colour, fontweight="bold",
            xytext=(cell.kept_fraction + (0.03 if right else -0.03), height if right else height + 0.03),
            ha="left" if right else "right", va="center" if right else "bottom",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6},
        )  # fmt: skip
