"""What a run came to: tables on the screen, or as text for a paper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.comparison_tables import comparison_tables, press_table
from kvzip_press.leaderboard.analysis.correlation import correlation_of_rows
from kvzip_press.leaderboard.analysis.counting import task_ranges
from kvzip_press.leaderboard.analysis.curves import areas_over_bytes
from kvzip_press.leaderboard.analysis.references import Judgement, judge
from kvzip_press.leaderboard.analysis.reuse import reuse_lines, reuses
from kvzip_press.leaderboard.analysis.summary import Cell, split_tables, summarise, summarise_tasks
from kvzip_press.leaderboard.analysis.table import results_table, text_table
from kvzip_press.leaderboard.analysis.ties import ties
from kvzip_press.leaderboard.analysis.written_table import FORMS, TextTable, written_table, written_whole
from kvzip_press.leaderboard.options import check_name
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.run_files import incomplete, rows_of
from kvzip_press.leaderboard.running.run_directory import ROWS
from kvzip_press.terminal import plain


def print_table(path: str | os.PathLike[str], *, console: Console | None = None) -> None:
    """Prints the tables of a run directory: one for each run, with query-agnostic and query-aware rows apart.

    Raises:
        RunDirectoryError: The directory has no rows.
        MissingDependencyError: scipy is not installed.
    """
    console, rows = console or Console(), rows_of(path)
    for group in split_tables(rows):
        with console.status("comparing the presses"):
            cells, judgement, found = summarise(group), judge(group), ties(group)
        marks = _marks(cells, judgement)
        title = f"{_asked_of(group[0])}: {cells[0].n_questions} questions a row"
        console.print(results_table(cells, title, marks))
        for tie in found:
            console.print(plain(str(tie), "yellow"))
        for line in _measures(group, cells, judgement):
            console.print(plain(line))
    if note := incomplete(path, rows):
        console.print(plain(note), style="yellow")
    console.print(plain(f"rows: {Path(path) / ROWS}"))


def written_tables(path: str | os.PathLike[str], form: str) -> str:
    """Returns the tables of a run directory as text for a paper; see `written_table`.

    Raises:
        RunDirectoryError: The directory has no rows.
        InvalidArgumentError: There is no such form.
        MissingDependencyError: scipy is not installed.
    """
    tables = []
    for group in split_tables(rows_of(path)):
        cells = summarise(group)
        tables.append(written_table(cells, form, _marks(cells, judge(group))))
    return "\n\n".join(tables)


def reuse_tables(
    path: str | os.PathLike[str], form: str, questions: Sequence[int], *, console: Console | None = None
) -> str:
    """Returns what many questions about a context cost, a table for each of a run directory's that has times.

    Args:
        path: The directory.
        form: "terminal", or as `written_table`.
        questions: Rising numbers of questions.
        console: What a table for the terminal is laid out for.

    Raises:
        RunDirectoryError: The directory has no rows.
        InvalidArgumentError: There is no such form, the numbers do not rise, or no table has times and a full cache.
    """
    _check_form(form)
    tables = [found for group in split_tables(rows_of(path)) if (found := reuses(group))]
    if not tables:
        raise InvalidArgumentError(f"expected rows with times, of contexts and of a full cache, got none in {path}")
    return _shown([TextTable("", *reuse_lines(found, questions)) for found in tables], form, console)


def compared_tables(
    path: str | os.PathLike[str],
    form: str,
    *,
    reference: str | None = None,
    press: str | None = None,
    console: Console | None = None,
) -> str:
    """Returns how the presses of a run directory compare, for each of its tables: see `comparison_tables`.

    Args:
        path: The directory.
        form: "terminal", or as `written_table`.
        reference: The label of what presses are compared with besides the full cache; None for KVzip.
        press: A label: only this press is compared, with intervals and task by task (`press_table`).
        console: What tables for the terminal are laid out for.

    Raises:
        RunDirectoryError: The directory has no rows.
        InvalidArgumentError: There is no such form, or a label that no row has.
        MissingDependencyError: scipy is not installed.
    """
    _check_form(form)
    groups = split_tables(rows_of(path))
    asked = [label for label in (press, reference) if label is not None]
    labels = dict.fromkeys(row.press for group in groups for row in group)
    for label in asked:
        check_name("a press of this run", label, labels)
    tables = []
    for group in groups:
        if not {*asked} <= {row.press for row in group}:
            continue
        found = comparison_tables(group, reference) if press is None else [press_table(group, press, reference)]
        what = f"{_asked_of(group[0])}, {'agreement' if group[0].follows_full_cache else 'answers'}"
        tables += [replace(table, title=f"{what}: {table.title}") for table in found]
    return _shown(tables, form, console)


def _asked_of(row: Row) -> str:
    """Says which model was asked, and whether the questions were known when contexts were compressed."""
    return f"{row.model}, {'query-aware' if row.query_aware else 'query-agnostic'}"


def _check_form(form: str) -> None:
    check_name("a form", form, ("terminal", *FORMS))


def _shown(tables: Sequence[TextTable], form: str, console: Console | None) -> str:
    """Returns the tables as text, for the terminal or for a paper."""
    if form != "terminal":
        return "\n\n".join(written_whole(table, form) for table in tables)
    console = console or Console()
    with console.capture() as captured:
        for table in tables:
            console.print(text_table(table))
    return captured.get()


def print_correlation(
    path: str | os.PathLike[str], other: str | os.PathLike[str], *, console: Console | None = None
) -> None:
    """Prints the rank correlation of the presses of two runs.

    Raises:
        RunDirectoryError: A directory has no rows.
        InvalidArgumentError: A directory has several tables, or they share too few presses.
        MissingDependencyError: scipy is not installed.
    """
    console = console or Console()
    mine, theirs = (_answered(rows_of(directory)) for directory in (path, other))
    found = correlation_of_rows(mine, theirs)
    for ratio, value in found.by_ratio.items():
        console.print(plain(f"{ratio:g} removed, {found.n_presses[ratio]} presses: {value:+z.2f}"))
    models = f"{mine[0].model} and {theirs[0].model}"
    said = "" if found.interval is None else f" [{found.interval[0]:+z.2f}, {found.interval[1]:+z.2f}]"
    console.print(
        plain(f"Spearman's rank correlation of accuracies on {models}, mean over ratios: {found.mean:+z.2f}{said}")
    )
    if said:
        console.print(plain("In brackets: 95 % of such means with contexts drawn anew, for these presses"))


def _answered(rows: Sequence[Row]) -> Sequence[Row]:
    """Returns the rows that answer a question, of a run that has others too, which follow the full cache."""
    return [row for row in rows if not row.follows_full_cache] or rows


def _marks(cells: Sequence[Cell], judgement: Judgement) -> dict[tuple[str, float], str]:
    return {key: judgement.marks(*key) for key in {(cell.press, cell.compression_ratio) for cell in cells}}


def _measures(rows: Sequence[Row], cells: Sequence[Cell], judgement: Judgement) -> list[str]:
    """Says what the table below its figures has to say: areas over bytes, what could be found, which tasks count."""
    said = []
    if areas := areas_over_bytes(cells):
        ends = {press: f" (measured to {end / 1e6:.3g} MB)" for press, end in areas.ends.items()}
        known = [(press, area) for press, area in areas.areas.items() if area is not None]
        shown = ", ".join(f"{press} {area:.3f}{ends.get(press, '')}" for press, area in known)
        said.append(f"Area under accuracy over {areas.low / 1e6:.3g} to {areas.high / 1e6:.3g} MB (log axis): {shown}")
        if any(press in ends for press, _ in known):
            said.append("Beyond what was measured of a press, its area is that of a straight line to the full cache.")
    found = [one.detectable for one in judgement.against_full.values() if one.detectable]
    if found:
        said.append(
            f"Smallest difference from the full cache that such contexts show in four of five repetitions: "
            f"{min(found):.2f} to {max(found):.2f}"
        )
    return said + [str(one) for one in task_ranges(summarise_tasks(rows)) if not one.counts]
