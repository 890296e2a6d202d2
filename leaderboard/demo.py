"""``kvzip-press demo``: what each press costs and saves, shown on a small model in a few minutes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvzip_press import get_press, load_model
from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.picture import save_pareto
from kvzip_press.leaderboard.plan import PressSpec, Run, TaskSpec, Work, count_rows, plan
from kvzip_press.leaderboard.results import Row, RowWriter
from kvzip_press.leaderboard.runner import execute
from kvzip_press.leaderboard.summary import Cell, summarise
from kvzip_press.leaderboard.table import results_table
from kvzip_press.leaderboard.tasks import get_task

PRESSES = (
    PressSpec("none", "full cache", compression_ratios=(0.0,)),
    PressSpec("random", "random"),
    PressSpec("kvzip", "KVzip"),
    PressSpec("fastkvzip", "Fast KVzip (gated)"),
    PressSpec("snapkv", "SnapKV"),
    PressSpec("adakv_expected_attention", "AdaKV (ExpectedAttention)"),
)
COMPRESSION_RATIOS = (0.5, 0.7, 0.9)
TASKS = (
    TaskSpec(get_task("hidden_facts", n_keys=4), n_contexts=7, length_tokens=450),
    TaskSpec(get_task("profile_qa", n_people=1, n_attributes=8), n_contexts=4, length_tokens=450),
)
SEED = 17  # not one of those that the tasks were tried out with
TIME_LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Demo:
    """What a demo left behind.

    Attributes:
        cells: The numbers of the table.
        rows_path: The rows, JSONL.
        picture_path: The Pareto picture, None where matplotlib is absent.
    """

    cells: tuple[Cell, ...]
    rows_path: Path
    picture_path: Path | None


def run_demo(
    output_dir: str | os.PathLike[str] = "outputs/demo",
    *,
    model_name: str = "smollm2",
    seed: int = SEED,
    tasks: tuple[TaskSpec, ...] = TASKS,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    console: Console | None = None,
) -> Demo:
    """Compress a few contexts with every press, ask them questions, print the table and save rows and picture.

    Args:
        output_dir: Gets ``rows.jsonl`` and ``pareto.png``; rows of an earlier demo become ``rows.previous.jsonl``.
        model_name: As for `kvzip_press.load_model`.
        seed: Of the samples.
        tasks: What is asked.
        time_limit_seconds: No new context is begun after so many seconds, so that a slow machine ends too, with fewer
            questions. Every context goes through all presses, so the comparison stays fair.
        console: Where to print.

    Raises:
        MissingDependencyError: The model is not to be had. (Presses that need an absent package, or
            gates that the model has none of, are left out.)
    """
    console = console or Console()
    model, tokenizer = _load(model_name, console)
    with console.status("looking for presses"):
        presses = tuple(_available(console, model))
    run = Run(model_name, tasks, presses, COMPRESSION_RATIOS, seed)
    rows_path = _fresh(Path(output_dir) / "rows.jsonl")
    begin = time.perf_counter()
    rows = _measure(run, model, tokenizer, rows_path, console, begin + time_limit_seconds)
    cells = summarise(rows)
    title = f"{model_name}, seed {seed}: {cells[0].n_questions} questions a row, {time.perf_counter() - begin:.0f} s"
    console.print(results_table(cells, title))
    picture_path = _draw(
        cells, rows_path.with_name("pareto.png"), f"{model_name}: accuracy of compressed caches", console
    )
    console.print(f"rows: {rows_path}", *([f"\npicture: {picture_path}"] if picture_path else []), sep="")
    return Demo(tuple(cells), rows_path, picture_path)


def _load(model_name: str, console: Console) -> tuple[Any, Any]:
    with console.status(f"loading {model_name} (the embedded model is unpacked once, about 10 seconds)"), _quiet():
        return load_model(model_name)


def _available(console: Console, model: Any) -> Iterator[PressSpec]:
    """The presses that are installed and have what they need for the model; a line says which are left out, and why."""
    for spec in PRESSES:
        try:
            get_press(spec.name, compression_ratio=0.0).observer(model)
        except (MissingDependencyError, InvalidArgumentError) as error:
            console.print(f"left out: {spec.label} ({error})", style="yellow", markup=False)
        else:
            yield spec


def _fresh(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_suffix(".previous.jsonl"))
    return path


def _measure(run: Run, model: Any, tokenizer: Any, rows_path: Path, console: Console, deadline: float) -> list[Row]:
    works, rows = plan(run, tokenizer), []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RowWriter(rows_path) as writer, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("reading the first context", total=count_rows(run, works))
        for row in execute(run, _until(works, deadline, console), model, tokenizer):
            writer.write(row)
            rows.append(row)
            progress.update(
                bar, advance=1, description=f"{row.task} {row.sample_id}: {row.press} {row.compression_ratio}"
            )
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
        console.print(f"no picture: {error}", style="yellow", markup=False)
        return None
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers while a model loads; afterwards as before."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
