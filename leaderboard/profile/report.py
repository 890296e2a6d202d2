"""The table of a profile on the terminal, by context length and press."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from kvzip_press.leaderboard.profile.rows import ProfileRow
from kvzip_press.terminal import plain

_CAPTION = (
    "Prefill: one dense forward, with what the press does inside it; compress: scoring and evicting after it. Decode: "
    "median of a step of one row. Resident: keys and values held; "
    "times smaller than uncompressed. Peak: GPU memory beyond the weights."
)


def profile_table(rows: Sequence[ProfileRow], title: str = "") -> Table:
    """Returns a table with one row per cache, grouped by context length.

    Args:
        rows: Shown in their order.
        title: Shown above the table.
    """
    compiled = any(row.decode_ms_compiled is not None for row in rows)
    names = ["removed", "prefill\ns", "compress\ns", "compress/\nprefill", "decode ms\neager", "decode ms\ngraph"]
    names += ["decode ms\ncompiled"] * compiled + ["resident\nMB", "times\nsmaller", "peak\nMB"]
    table = Table(
        title=plain(title, "table.title") if title else None,
        caption=_CAPTION if rows else "no rows",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("press", min_width=12, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    above = None
    for row in rows:
        if above is not None and above != row.context_length:
            table.add_section()
        length = "" if above == row.context_length else str(row.context_length)
        table.add_row(length, plain(row.label), *_figures(row, compiled))
        above = row.context_length
    return table


def _figures(row: ProfileRow, compiled: bool) -> tuple[str, ...]:
    removed = "-" if row.press == "none" else f"{row.compression_ratio:.2f}"
    if row.error is not None:
        return removed, "error"
    peaks = [peak for peak in (row.peak_prefill_bytes, row.peak_compress_bytes) if peak is not None]
    return (
        removed,
        _text(row.prefill_seconds, ".3f"),
        _text(row.compress_seconds, ".3f"),
        _text(_ratio(row.compress_seconds, row.prefill_seconds), ".2f"),
        _text(row.decode_ms_eager, ".2f"),
        _text(row.decode_ms_graph, ".2f"),
        *([_text(row.decode_ms_compiled, ".2f")] * compiled),
        _text(_ratio(row.resident_bytes, 1e6), ".1f"),
        _text(_ratio(row.dense_bytes, row.resident_bytes), ".2f"),
        _text(_ratio(max(peaks, default=None), 1e6), ".1f"),
    )


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
