"""Figures that are drawn without a screen and saved, and the look of each press in them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvzip_press.errors import MissingDependencyError
from kvzip_press.files import replacing
from kvzip_press.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart; markers tell presses apart too.
# Seven colours and six markers distinguish 42 presses. The page (report/style.css, elements.js) uses the same.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP"
_FULL_COLOUR = "#6B7280"
_MAX_CHARACTERS = 60
HEAT = "Blues"  # one hue, from light to dark: readable in print and with any kind of colour vision


@dataclass(frozen=True)
class Look:
    """How a press is drawn."""

    colour: str
    marker: str


def looks(presses: Iterable[str], full: str | None) -> dict[str, Look]:
    """Returns how each press is drawn: the full cache in grey, each other press by its place in the order."""
    others = [press for press in dict.fromkeys(presses) if press != full]
    found = {
        press: Look(_COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)])
        for place, press in enumerate(others)
    }
    return found if full is None else {**found, full: Look(_FULL_COLOUR, "h")}


def shown(text: str) -> str:
    """Returns a name as a picture shows it: printable, on one line, and not longer than the picture is wide.

    Whoever draws it also says ``parse_math=False``: else matplotlib reads what stands between dollars as a formula.
    """
    name = printable(text)
    return name if len(name) <= _MAX_CHARACTERS else f"{name[: _MAX_CHARACTERS - 1]}…"


@contextmanager
def canvas(path: str | os.PathLike[str], title: str, size: tuple[float, float]) -> Iterator["Axes"]:
    """Gives axes to draw on, and saves them when the with statement ends, in the format of the path's suffix.

    The file is written whole or not at all.

    Args:
        path: The file; its directory is created if it does not exist.
        title: Shown above the axes.
        size: Width and height in inches.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
        CacheFileError: The file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(shown(title), parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    path = Path(path)
    with replacing(path, parents=True) as unfinished:
        figure.savefig(unfinished, dpi=160, format=path.suffix.removeprefix(".") or None)
