"""The table on the terminal: one row per press and removed fraction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from kvzip_press.leaderboard.analysis.ratios import ratio_text
from kvzip_press.leaderboard.analysis.references import MARKS_CAPTION, CellKey
from kvzip_press.leaderboard.analysis.summary import Cell
from kvzip_press.leaderboard.analysis.written_table import TextTable
from kvzip_press.terminal import plain

_CAPTION = (
    "Means over contexts. Prefill is one forward that all presses share, those that watch it included; compress is "
    "scoring and evicting; answer is one question read and answered. Times smaller: than an uncompressed cache."
)
_WRITTEN = (
    "Means over samples without a context. Cache is the most that it held while the answer was written, room for the "
    "next tokens included; ms is of a token, prompt and evictions included."
)
_FOLLOWED = (
    "Means over samples along what the full cache wrote. Same: next tokens whose most likely one is the full cache's; "
    "KL is from its probabilities. Cache is what the question finds; without a context, the most that was held."
)


def results_table(cells: Sequence[Cell], title: str = "", marks: Mapping[CellKey, str] | None = None) -> Table:
    """Returns a table with one row per cell; without cells it is only a header, with a caption that says so.

    Args:
        cells: From `summarise`, shown in their order.
        title: Shown above the table.
        marks: Shown behind a cell's accuracy, by press and ratio, such as "†".
    """
    marks, form = marks or {}, _form_of(cells)
    caption = f"{form.caption} {MARKS_CAPTION}" if any(marks.values()) else form.caption
    table = Table(
        title=plain(title, "table.title") if title else None,
        caption=caption if cells else "no rows",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,  # the box has a space between columns; with more, figures are cut off at 80 columns
    )
    table.add_column("press", min_width=10, overflow="fold")
    for name in ("removed", form.score, "kept", "cache\nMB", "times\nsmaller", *form.columns):
        table.add_column(name, justify="right", no_wrap=True)
    above = None
    for cell in cells:
        if above is not None and above != cell.press:
            table.add_section()
        table.add_row(
            "" if above == cell.press else plain(cell.press),
            *_figures(cell, marks.get((cell.press, cell.compression_ratio), "")),
            *(_figure(get(cell), decimals) for get, decimals in form.columns.values()),
        )
        above = cell.press
    return table


def text_table(texts: TextTable) -> Table:
    """Returns a table of texts, the first column to the left and the others to the right."""
    title, note = (plain(text) if text else None for text in (texts.title, texts.note))
    table = Table(
        title=title, title_justify="left", caption=note, caption_justify="left", header_style="bold",
        box=box.SIMPLE_HEAD, padding=0,
    )  # fmt: skip
    for place, name in enumerate(texts.head):
        table.add_column(plain(name), justify="right" if place else "left", overflow="fold")
    for row in texts.rows:
        table.add_row(*map(plain, row))
    return table


@dataclass(frozen=True)
class _Form:
    """What a table shows besides sizes: the name of the score, the last columns with their decimals, the caption."""

    score: str
    columns: dict[str, tuple[Callable[[Cell], float | None], int]]
    caption: str


def _form_of(cells: Sequence[Cell]) -> _Form:
    if any(cell.kl is not None for cell in cells):
        return _Form("same", {"KL\nnats": (lambda cell: cell.kl, 3)}, _FOLLOWED)
    if cells and all(cell.prefill_seconds == 0 for cell in cells):
        return _Form("accuracy", {"ms a\ntoken": (lambda cell: cell.ms_per_token, 1)}, _WRITTEN)
    seconds: dict[str, tuple[Callable[[Cell], float | None], int]] = {
        "prefill\ns": (lambda cell: cell.prefill_seconds, 2),
        "compress\ns": (lambda cell: cell.compress_seconds, 2),
        "answer\ns": (lambda cell: cell.answer_seconds, 2),
    }
    return _Form("accuracy", seconds, _CAPTION)


def _figures(cell: Cell, marks: str) -> tuple[str, ...]:
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.2f}"
    megabytes = None if cell.resident_bytes is None else cell.resident_bytes / 1e6
    return (
        ratio_text(cell.compression_ratio),
        f"{cell.accuracy:.2f}{error}{marks and ' '}{marks}",
        _figure(cell.kept_fraction),
        _figure(megabytes, 1),
        _figure(cell.compression, 1),
    )


def _figure(value: float | None, decimals: int = 2) -> str:
    """Formats a number, or a dash if no row has it; a divergence just below 0, by rounding, is 0 and not -0."""
    return "-" if value is None else f"{value:z.{decimals}f}"
