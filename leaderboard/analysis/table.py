"""The table on the terminal: one row per press and removed fraction."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from kvzip_press.leaderboard.analysis.references import MARKS_CAPTION, CellKey
from kvzip_press.leaderboard.analysis.summary import Cell
from kvzip_press.terminal import plain

_CAPTION = (
    "Means over contexts. Prefill is one forward that all presses share, those that watch it included; compress is "
    "scoring and evicting; answer is one question read and answered. Times smaller: than an uncompressed cache."
)


def results_table(cells: Sequence[Cell], title: str = "", marks: Mapping[CellKey, str] | None = None) -> Table:
    """Returns a table with one row per cell; without cells it is only a header, with a caption that says so.

    Args:
        cells: From `summarise`, shown in their order.
        title: Shown above the table.
        marks: Shown behind a cell's accuracy, by press and ratio, such as "†".
    """
    marks = marks or {}
    caption = f"{_CAPTION} {MARKS_CAPTION}" if any(marks.values()) else _CAPTION
    table = Table(
        title=plain(title, "table.title") if title else None,
        caption=caption if cells else "no rows",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,  # the box has a space between columns; with more, figures are cut off at 80 columns
    )
    table.add_column("press", min_width=10, overflow="fold")
    names = ["removed", "accuracy", "kept", "cache\nMB", "times\nsmaller", "prefill\ns", "compress\ns", "answer\ns"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    above = None
    for cell in cells:
        if above is not None and above != cell.press:
            table.add_section()
        table.add_row(
            "" if above == cell.press else plain(cell.press),
            *_figures(cell, marks.get((cell.press, cell.compression_ratio), "")),
        )
        above = cell.press
    return table


def _figures(cell: Cell, marks: str) -> tuple[str, ...]:
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.2f}"
    megabytes = None if cell.resident_bytes is None else cell.resident_bytes / 1e6
    return (
        f"{cell.compression_ratio:.2f}",
        f"{cell.accuracy:.2f}{error}{marks and ' '}{marks}",
        _figure(cell.kept_fraction),
        _figure(megabytes, 1),
        _figure(cell.compression, 1),
        *(_figure(seconds) for seconds in (cell.prefill_seconds, cell.compress_seconds, cell.answer_seconds)),
    )


def _figure(value: float | None, decimals: int = 2) -> str:
    """Formats a number, or a dash if no row has it."""
    return "-" if value is None else f"{value:.{decimals}f}"
