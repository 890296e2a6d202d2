"""The work behind the commands: run a grid into a directory, and show a directory on the screen."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvzip_press.errors import InvalidArgumentError, RunDirectoryError
from kvzip_press.files import check_writable, replacing
from kvzip_press.leaderboard.analysis.correlation import correlation_of_rows
from kvzip_press.leaderboard.analysis.counting import task_ranges
from kvzip_press.leaderboard.analysis.curves import areas_over_bytes
from kvzip_press.leaderboard.analysis.references import Judgement, judge
from kvzip_press.leaderboard.analysis.reuse import reuse_lines, reuses
from kvzip_press.leaderboard.analysis.summary import Cell, split_tables, summarise, summarise_tasks
from kvzip_press.leaderboard.analysis.table import results_table, text_table
from kvzip_press.leaderboard.analysis.ties import ties
from kvzip_press.leaderboard.analysis.written_table import FORMS, written, written_table
from kvzip_press.leaderboard.options import check_name
from kvzip_press.leaderboard.progress import quiet_loading, row_bar
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.line_file import read_lines
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.running.availability import available, check_files
from kvzip_press.leaderboard.running.endpoint import Endpoint
from kvzip_press.leaderboard.running.plan import Run, Work, count_rows, plan, shard
from kvzip_press.leaderboard.running.process_executor import places, process_workers
from kvzip_press.leaderboard.running.ray_executor import Cluster, ray_workers
from kvzip_press.leaderboard.running.run_directory import (
    HEADS,
    LOCK,
    ROWS,
    RUN,
    OfRun,
    RunDirectory,
    RunRecord,
    lines_of,
)
from kvzip_press.leaderboard.running.shards import run_shard
from kvzip_press.leaderboard.running.spread import Workers, spread
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.devices import get_device, get_dtype
from kvzip_press.terminal import plain


def launch(
    run: Run,
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    shard_of: tuple[int, int] = (0, 1),
    skip_unavailable: bool = False,
    force: bool = False,
    address: str | None = None,
    console: Console | None = None,
) -> None:
    """Runs whatever a directory still lacks of a run, and prints the table.

    Args:
        run: The run.
        output: Its directory.
        device: Where the model goes; by default the GPU, if there is one.
        shard_of: ``(index, count)``: only every count-th context, beginning with ``index``.
        skip_unavailable: Whether presses that are not available are left out, with a line for each, instead of being an
            error.
        force: Whether to begin again; existing files are kept under other names.
        address: Of a running `kvzip-press serve` that answers; None for the model itself.
        console: Where to print.

    Raises:
        KVzipPressError: See `run_shard`, `RunDirectory` and `kvzip_press.load_model`.
    """
    console = console or Console()
    if not skip_unavailable:
        check_files(run)
    place = get_device(device)
    check_writable(Path(output) / LOCK, "the lock of the run in --output", parents=True)
    with console.status(plain(f"loading {run.model_name}")):
        model, tokenizer = load_for(run, str(place))
    if skip_unavailable:
        run = _without_unavailable(run, model, console)
    with console.status("making the contexts"):
        works = plan(run, tokenizer)
    record, mine = RunRecord.of(run, model, count_rows(run, works)), shard(works, *shard_of)
    with RunDirectory(output, record, force=force) as directory:
        missing = count_rows(run, mine) - _count_done(directory, mine)
        endpoint = None if address is None else Endpoint(address, run.model_name, model, tokenizer)
        with row_bar(console, missing) as on_row:
            run_shard(run, mine, model, tokenizer, directory, on_row=on_row, endpoint=endpoint)
    print_table(output, console=console)


def _without_unavailable(run: Run, model: Any, console: Console) -> Run:
    """Leaves out presses that are not available for a model, with a line for each."""
    return replace(run, presses=available(run.presses, model, lambda line: console.print(plain(line, "yellow"))))


def load_for(run: Run, device: str) -> tuple[Any, Any]:
    """Loads a run's model and tokenizer onto a device."""
    dtype = None if run.dtype == "auto" else get_dtype(run.dtype)
    with quiet_loading():
        return load_on(run.model_name, torch.device(device), dtype)


def launch_spread(
    run: Run,
    output: str | os.PathLike[str],
    *,
    executor: str,
    workers: int,
    address: str | None = None,
    device: str | None = None,
    shard_of: tuple[int, int] = (0, 1),
    skip_unavailable: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> None:
    """Does what `launch` does, spread over workers that each hold the model.

    Args:
        run: The run.
        output: Its directory, on this machine.
        executor: "processes" for workers on this machine, which share its GPUs evenly, or "ray".
        workers: Number of workers.
        address: Address of a Ray cluster; None for this machine alone.
        device: The workers' device; by default the GPUs, if this machine has any. "cuda" gives workers of Ray a GPU
            each, and spreads processes over all of them; "cuda:1" puts all processes on that one.
        shard_of: As in `launch`.
        skip_unavailable: As in `launch`; the model is then loaded here first, onto the CPU.
        force: As in `launch`.
        console: Where to print.

    Raises:
        KVzipPressError: See :func:`~kvzip_press.leaderboard.running.spread.spread`.
    """
    console = console or Console()
    if skip_unavailable:
        run = _without_unavailable(run, load_for(run, "cpu")[0], console)
    else:
        check_files(run)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_writable(Path(output) / LOCK, "the lock of the run in --output", parents=True)
    with ExitStack() as stack:
        if executor == "ray":
            cluster = Cluster(workers, address, gpus_each=float(device.startswith("cuda")))
            spread_over: Workers = stack.enter_context(
                ray_workers(run, functools.partial(load_for, run, device), cluster)
            )
        else:
            loads = [functools.partial(load_for, run, place) for place in places(device, workers)]
            spread_over = stack.enter_context(process_workers(run, loads))
        spread(
            spread_over,
            output,
            shard_of=shard_of,
            force=force,
            on_begin=lambda missing: stack.enter_context(row_bar(console, missing)),
        )
    print_table(output, console=console)


def rows_of(path: str | os.PathLike[str]) -> list[Row]:
    """Reads the rows of a run directory.

    Raises:
        RunDirectoryError: The directory has no rows, or rows of another run than its record says.
        InvalidArgumentError: A row is damaged.
    """
    if not (Path(path) / ROWS).is_file():
        raise RunDirectoryError(f"expected the directory of a run, with {ROWS} in it, got {path}")
    return _lines_of(Path(path), ROWS, Row)


def heads_of(path: str | os.PathLike[str]) -> list[HeadBudgets]:
    """Reads what the heads kept from a run directory; empty if it holds no such file. Raises as `rows_of` does."""
    return _lines_of(Path(path), HEADS, HeadBudgets) if (Path(path) / HEADS).is_file() else []


def _lines_of(path: Path, name: str, kind: type[OfRun]) -> list[OfRun]:
    """Reads a file of lines; they must be of the run that the directory is of, if it says so."""
    known = (path / RUN).is_file()
    return list(lines_of(path / name, kind, RunRecord.read(path)) if known else read_lines(path / name, kind))


def config_of(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Returns the configuration of a run directory; empty if it has no record, as rows of other programs.

    Raises:
        RunDirectoryError: The record cannot be read, or was changed.
    """
    return RunRecord.read(path).config if (Path(path) / RUN).is_file() else {}


def incomplete(path: str | os.PathLike[str], rows: Sequence[Row], heads: Sequence[HeadBudgets] = ()) -> str:
    """Says what a run lacks that its record and its rows tell of, such as "3 of the run's 24 rows"; empty if nothing.

    With ``heads``, caches of the rows whose heads are missing count too, in tasks of which there are any.
    """
    said = []
    if (Path(path) / RUN).is_file() and len(rows) < (n_rows := RunRecord.read(path).n_rows):
        said.append(f"{len(rows)} of the run's {n_rows} rows")
    tasks, known = {line.task for line in heads}, {line.key for line in heads}
    caches = {
        (row.task, row.sample_id, row.question_id if row.query_aware else "", row.press, row.compression_ratio)
        for row in rows
        if row.task in tasks
    }
    if caches - known:
        said.append(f"heads of {len(caches & known)} of {len(caches)} caches")
    return "; ".join(said)


def store(rows: Iterable[Row], output: str | os.PathLike[str]) -> int:
    """Writes rows from another program into a directory that has none, and returns how many there were.

    The file is written whole or not at all.

    Raises:
        RunDirectoryError: The directory already holds rows.
        CacheFileError: The file cannot be written.
    """
    file = Path(output) / ROWS
    if os.path.lexists(file):
        raise RunDirectoryError(f"expected a directory without {ROWS}, got {output}")
    lines = [row.to_line() + "\n" for row in rows]
    with replacing(file, parents=True) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    return len(lines)


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
        form = "query-aware" if cells[0].query_aware else "query-agnostic"
        title = f"{cells[0].model}, {form}: {cells[0].n_questions} questions a row"
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
    check_name("a form", form, ("terminal", *FORMS))
    tables = [found for group in split_tables(rows_of(path)) if (found := reuses(group))]
    if not tables:
        raise InvalidArgumentError(f"expected rows with times, of contexts and of a full cache, got none in {path}")
    lines = [reuse_lines(found, questions) for found in tables]
    if form != "terminal":
        return "\n\n".join(written(head, rows, form) for head, rows in lines)
    console = console or Console()
    with console.capture() as captured:
        for head, rows in lines:
            console.print(text_table(head, rows))
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


def _count_done(directory: RunDirectory, works: Iterable[Work]) -> int:
    """Counts the rows of these contexts that the directory has."""
    samples = {(work.task.name, work.sample.sample_id) for work in works}
    return sum((key.task, key.sample_id) in samples for key in directory.done)
