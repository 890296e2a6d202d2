"""``kvzip-press demo``: shows on a small model, in a few minutes, what each press costs and saves."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kvzip_press import load_model
from kvzip_press.errors import MissingDependencyError, RunDirectoryError
from kvzip_press.files import check_writable
from kvzip_press.leaderboard.analysis.summary import Cell, summarise
from kvzip_press.leaderboard.analysis.table import results_table
from kvzip_press.leaderboard.pictures import save_pareto
from kvzip_press.leaderboard.progress import quiet_loading, row_bar
from kvzip_press.leaderboard.rows.line_file import check_not_written, keep_aside
from kvzip_press.leaderboard.rows.results import Row, RowWriter
from kvzip_press.leaderboard.running.availability import available
from kvzip_press.leaderboard.running.grid import load_grid
from kvzip_press.leaderboard.running.plan import Run, TaskSpec, Work, count_rows, plan
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.terminal import plain

GRID = "quick"
TIME_LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Demo:
    """The results of a demo.

    Attributes:
        cells: The numbers of the table.
        rows_path: The file of rows, JSONL.
        picture_path: The Pareto picture, None if matplotlib is not installed.
    """

    cells: tuple[Cell, ...]
    rows_path: Path
    picture_path: Path | None


def run_demo(
    output_dir: str | os.PathLike[str] = "outputs/demo",
    *,
    model_name: str = "smollm2",
    seed: int | None = None,
    tasks: tuple[TaskSpec, ...] | None = None,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    console: Console | None = None,
) -> Demo:
    """Compresses a few contexts with every press, asks questions, prints the table and saves rows and picture.

    Args:
        output_dir: Gets ``rows.jsonl`` and ``pareto.png``; rows of an earlier demo become ``rows.previous.jsonl``,
            and those of one before it ``rows.previous.1.jsonl`` and so on.
        model_name: As for `kvzip_press.load_model`.
        seed: Seed of the samples; None for that of the grid `GRID`.
        tasks: The tasks to ask; None for those of the grid.
        time_limit_seconds: No new context is begun after this many seconds, so that a slow machine finishes too, with
            fewer questions. Every context goes through all presses, so the comparison stays fair.
        console: Where to print.

    Raises:
        MissingDependencyError: The model is not available. (Presses that need a missing package, or gates that the
            model does not have, are left out.)
    """
    console = console or Console()
    grid = load_grid(GRID).run
    check_writable(Path(output_dir) / "rows.jsonl", "the rows in --output", parents=True)
    model, tokenizer = _load(model_name, console)
    with console.status("looking for presses"):
        presses = available(grid.presses, model, lambda line: console.print(plain(line, "yellow")))
    run = replace(
        grid,
        model_name=model_name,
        tasks=tasks or grid.tasks,
        presses=presses,
        seed=grid.seed if seed is None else seed,
    )
    rows_path = _fresh(Path(output_dir) / "rows.jsonl")
    begin = time.perf_counter()
    rows = _measure(run, model, tokenizer, rows_path, console, begin + time_limit_seconds)
    cells = summarise(rows)
    title = (
        f"{model_name}, seed {run.seed}: {cells[0].n_questions} questions a row, {time.perf_counter() - begin:.0f} s"
    )
    console.print(results_table(cells, title))
    picture_path = _draw(
        cells, rows_path.with_name("pareto.png"), f"{model_name}: accuracy of compressed caches", console
    )
    console.print(plain(f"rows: {rows_path}"))
    if picture_path is not None:
        console.print(plain(f"picture: {picture_path}"))
    return Demo(tuple(cells), rows_path, picture_path)


def _load(model_name: str, console: Console) -> tuple[Any, Any]:
    with (
        console.status(plain(f"loading {model_name} (the embedded model is unpacked once, about 10 seconds)")),
        quiet_loading(),
    ):
        return load_model(model_name)


def _fresh(path: Path) -> Path:
    if not os.path.lexists(path):
        return path
    check_not_written(path)
    previous = path.with_suffix(".previous.jsonl")
    keep_aside([previous])
    try:
        path.rename(previous)
    except OSError as error:
        raise RunDirectoryError(f"expected to keep {path} aside as {previous.name}, got {error}") from error
    return path


def _measure(run: Run, model: Any, tokenizer: Any, rows_path: Path, console: Console, deadline: float) -> list[Row]:
    works, rows = plan(run, tokenizer), []
    with RowWriter(rows_path) as writer, row_bar(console, count_rows(run, works)) as on_row:
        for row in execute(run, _until(works, deadline, console), model, tokenizer):
            writer.write(row)
            rows.append(row)
            on_row(row)
    return rows


def _until(works: list[Work], deadline: float, console: Console) -> Iterator[Work]:
    for done, work in enumerate(works):
        if done and time.perf_counter() > deadline:
            console.print(f"time limit: stopped after {done} of {len(works)} contexts", style="yellow")
            return
        yield work


def _draw(cells: list[Cell], path: Path, title: str, console: Console) -> Path | None:
    try:
        save_pareto(cells, path, title)
    except MissingDependencyError as error:
        console.print(plain(f"no picture: {error}", "yellow"))
        return None
    return path
