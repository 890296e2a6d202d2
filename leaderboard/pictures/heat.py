"""Heat maps: scores by press and task, what each head keeps, and needles by depth and length."""

import math
import os
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from kvzip_press.leaderboard.analysis.maps import N_DEPTHS, HeadMap, NeedleMap
from kvzip_press.leaderboard.analysis.summary import Cell, find_full
from kvzip_press.leaderboard.pictures.canvas import HEAT, canvas, canvases, ink_on, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEPTHS = [f"{100 * tenth // N_DEPTHS}–{100 * (tenth + 1) // N_DEPTHS} %" for tenth in range(N_DEPTHS)]

Values = Sequence[Sequence[float | None]]


def save_task_map(
    task_cells: Sequence[Cell], path: str | os.PathLike[str], compression_ratio: float, title: str = ""
) -> None:
    """Draws presses by tasks at one ratio, with the full cache on top for comparison.

    Args:
        task_cells: Cells of one table, from `summarise_tasks`; may be empty.
        path: The file; its directory is created if it does not exist.
        compression_ratio: The ratio whose cells are drawn.
        title: Shown above the map.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    full = find_full(task_cells)
    drawn = [cell for cell in task_cells if cell.press == full or cell.compression_ratio == compression_ratio]
    presses, tasks = list(dict.fromkeys(cell.press for cell in drawn)), list(dict.fromkeys(cell.task for cell in drawn))
    found = {(cell.press, cell.task): cell.accuracy for cell in drawn}
    values = [[found.get((press, task)) for task in tasks] for press in presses]
    with canvas(path, title, (2.6 + 1.05 * len(tasks), 1.6 + 0.36 * len(presses))) as axes:
        _heat(
            axes, values, [shown(press) for press in presses], [shown(str(task)).replace("_", "\n") for task in tasks]
        )


def save_head_map(head_map: HeadMap, path: str | os.PathLike[str], title: str = "") -> None:
    """Draws what each head keeps, KV heads by layers. Arguments and errors as for `save_task_map`."""
    save_head_maps([(title, head_map)], path)


def save_head_maps(head_maps: Sequence[tuple[str, HeadMap]], path: str | os.PathLike[str]) -> None:
    """Draws what each head of several models keeps, side by side, each with its title. Errors as for `save_task_map`.

    A column of a map is as wide in all of them, so that a model of more layers has the wider map.
    """
    widths = [max(5.0, 1.6 + 0.24 * len(one.layers)) for _, one in head_maps]
    n_heads = max(len(layer) for _, one in head_maps for layer in one.kept)
    size = (sum(widths), 1.7 + 0.27 * n_heads)
    with canvases(path, [title for title, _ in head_maps], size, widths=widths) as found:
        for axes, (_, head_map) in zip(found, head_maps, strict=True):
            _draw_heads(axes, head_map)


def _draw_heads(axes: "Axes", head_map: HeadMap) -> None:
    layers = head_map.layers
    values = list(zip_longest(*head_map.kept))  # layers may have fewer heads than others
    _heat(axes, values, [str(head) for head in range(len(values))], [str(layer) for layer in layers], numbers=False)
    axes.set(xlabel="layer", ylabel="KV head")
    step = max(1, math.ceil(len(layers) / 16))
    axes.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(layer) for layer in layers[::step]])


def save_needle_map(needle_map: NeedleMap, path: str | os.PathLike[str], title: str = "") -> None:
    """Draws scores by depth and length of the context. Arguments and errors as for `save_task_map`."""
    lengths = [f"{length:,}" for length in needle_map.lengths]
    with canvas(path, title, (max(5.0, 2.2 + 0.8 * len(lengths)), 5)) as axes:
        _heat(axes, needle_map.scores, _DEPTHS, lengths)
        axes.set(xlabel="tokens of the context", ylabel="depth")


def save_depth_map(needle_maps: Sequence[NeedleMap], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws scores by press and depth, of maps that have one length each. Errors as for `save_task_map`."""
    with canvas(path, title, (9.6, 1.7 + 0.36 * len(needle_maps))) as axes:
        _heat(axes, [one.scores_by_depth for one in needle_maps], [shown(one.press) for one in needle_maps], _DEPTHS)
        axes.set(xlabel="depth")


def _heat(axes: "Axes", values: Values, rows: Sequence[str], columns: Sequence[str], *, numbers: bool = True) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if not rows:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no rows", ha="center", va="center", color="#666666", transform=axes.transAxes)
        return
    grid = np.array([[math.nan if value is None else value for value in row] for row in values])
    image = axes.pcolormesh(grid, vmin=0, vmax=1, cmap=HEAT, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, parse_math=False)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, parse_math=False)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=24, pad=0.02).outline.set_visible(False)
    for row, column in np.argwhere(~np.isnan(grid)) if numbers else ():
        value = grid[row, column]
        colour = ink_on(tuple(image.to_rgba(value)))
        axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
