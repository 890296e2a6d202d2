"""Figures that are drawn without a screen and saved, and what they have in common: signs, names, readable text."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvzip_press.errors import MissingDependencyError
from kvzip_press.files import replacing
from kvzip_press.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_CHARACTERS = 60
HEAT = "Blues"  # one hue, from light to dark: readable in print and with any kind of colour vision
INKS = ("#000000", "#ffffff")  # on any ground one of them has a contrast of 4.5 or more
SIGNS = {  # marker of a look -> matplotlib's name
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle": "^",
    "turned triangle": "v",
    "plus": "P",
    "cross": "X",
    "hexagon": "h",
}


def ink_on(ground: Sequence[float]) -> str:
    """Returns the colour of text that is readable on a ground: black or white, whichever has more contrast.

    Args:
        ground: Red, green and blue (and more, which is ignored), each in [0, 1].
    """
    return INKS[0] if luminance(ground) > _EQUAL_CONTRAST else INKS[1]


def luminance(colour: Sequence[float]) -> float:
    """Returns the relative luminance of a colour in sRGB, in [0, 1], as WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


_EQUAL_CONTRAST = 0.179  # the luminance L at which black and white do equally well: (L + 0.05)^2 = 1.05 * 0.05


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
    with canvases(path, [title], size) as (axes,):
        yield axes


@contextmanager
def canvases(
    path: str | os.PathLike[str], titles: Sequence[str], size: tuple[float, float], *, widths: Sequence[float] = (1,)
) -> Iterator[list["Axes"]]:
    """Gives axes side by side, one below each title; ``widths`` are how wide they are beside each other.

    Otherwise as `canvas`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(1, len(titles), squeeze=False, width_ratios=list(widths))[0].tolist()
    for axes, title in zip(found, titles, strict=True):
        axes.set_title(shown(title), parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    yield found
    path = Path(path)
    with replacing(path, parents=True) as unfinished:
        figure.savefig(unfinished, dpi=160, format=path.suffix.removeprefix(".") or None)
