"""Tokens on a ground that tells how much of each was kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvzip_press.leaderboard.pictures.canvas import HEAT, ink_on, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_tokens(
    axes: "Axes", tokens: Sequence[str], weights: Sequence[float], title: str = "", *, columns: int = 112
) -> None:
    """Writes tokens line by line, each on a ground that is the darker the larger its weight is.

    The text is black or white, whichever is easier to read on its ground.

    Args:
        axes: Empty axes of matplotlib; their ticks and frame are taken away.
        tokens: The texts, in order. A newline alone ends a line; any other newline is written as a space.
        weights: One number in [0, 1] for each token.
        title: Shown above.
        columns: Characters in a line.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    line = column = 0
    for token, weight in zip(tokens, weights, strict=True):
        text = token.replace("\n", " ")
        if column + len(text) > columns or token == "\n":  # noqa: S105  # no password
            line, column, text = line + 1, 0, text.lstrip()
        ground = colormaps[HEAT](float(weight))
        axes.add_patch(Rectangle((column, line), len(text), 1, color=ground, linewidth=0))
        axes.text(
            column, line + 0.5, text, color=ink_on(ground),
            family="monospace", fontsize=6.6, va="center", parse_math=False,
        )  # fmt: skip
        column += len(text)
    axes.set(xlim=(0, columns), ylim=(line + 1, 0))
    axes.set_title(shown(title), loc="left", fontsize=9, parse_math=False)
    axes.axis("off")
