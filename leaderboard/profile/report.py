"""The tables of a profile on the terminal, by context length and press: times and memory, each within 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from kvzip_press.leaderboard.analysis.ratios import ratio_text
from kvzip_press.leaderboard.profile.rows import ProfileRow
from kvzip_press.terminal import plain

_TIMES = (
    "Prefill: one dense forward, with what the press does inside it. Compress: scoring and evicting after it. Decode: "
    "a step of one row, the median ± half the interquartile range."
)
_MEMORY = "Resident: keys and values held; times smaller than uncompressed. Peak: GPU memory beyond the weights."


def profile_tables(rows: Sequence[ProfileRow], title: str = "") -> Group:
    """Returns two tables with one row per cache, grouped by context length: its times, and its memory.

    Args:
        rows: Shown in their order.
        title: Shown above the first table.
    """
    modes = ["eager", "graph"] + ["compiled"] * any(row.decode_ms_compiled is not None for row in rows)
    times = _table(
        ["prefill\ns", "compress\ns", *(f"decode ms\n{mode}" for mode in modes)],
        [(row, _times(row, modes)) for row in rows],
        title,
        _TIMES if rows else "no rows",
    )
    memory = _table(
        ["compress/\nprefill", "resident\nMB", "times\nsmaller", "peak\nMB"],
        [(row, _memory(row)) for row in rows],
        "",
        _MEMORY,
    )
    return Group(times, memory) if rows else Group(times)


def _table(names: Sequence[str], lines: Iterable[tuple[ProfileRow, Sequence[str]]], title: str, caption: str) -> Table:
    table = Table(
        title=plain(title, "table.title") if title else None,
        caption=caption,
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("press", min_width=8, overflow="fold")
    for name in ("removed", *names):
        table.add_column(name, justify="right", no_wrap=True)
    above = None
    for row, figures in lines:
        if above is not None and above != row.context_length:
            table.add_section()
        length = "" if above == row.context_length else str(row.context_length)
        removed = "-" if row.press == "none" else ratio_text(row.compression_ratio)
        table.add_row(length, plain(row.label), removed, *(["error"] if row.error is not None else figures))
        above = row.context_length
    return table


def _times(row: ProfileRow, modes: Sequence[str]) -> list[str]:
    return [
        _figure(row.prefill_seconds, 3),
        _figure(row.compress_seconds, 3),
        *(_decode(getattr(row, f"decode_ms_{mode}"), row.turns.get(mode, {})) for mode in modes),
    ]


def _decode(ms: float | None, turns: dict[str, float | None]) -> str:
    low, high = turns.get("low_ms"), turns.get("high_ms")
    if ms is None or low is None or high is None:
        return _figure(ms, 2)
    decimals = _decimals(ms, 2)
    return f"{ms:.{decimals}f} ±{(high - low) / 2:.{decimals}f}"


def _memory(row: ProfileRow) -> list[str]:
    peaks = [peak for peak in (row.peak_prefill_bytes, row.peak_compress_bytes) if peak is not None]
    return [
        _figure(_ratio(row.compress_seconds, row.prefill_seconds), 2),
        _figure(_ratio(row.resident_bytes, 1e6), 1),
        _figure(_ratio(row.dense_bytes, row.resident_bytes), 2),
        _figure(_ratio(max(peaks, default=None), 1e6), 1),
    ]


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _figure(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{_decimals(value, decimals)}f}"


def _decimals(value: float, most: int) -> int:
    """Returns how many decimals are shown: fewer of large numbers, which have enough digits."""
    return max(0, most - (value >= 10) - (value >= 100) - (value >= 1000))
