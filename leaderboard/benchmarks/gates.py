"""Compares gated KVzip with KVzip and with equally cheap presses, on the demo's tasks and on held-out families.

``python -m kvzip_press.leaderboard.benchmarks.gates --contexts 25`` (about 300 questions per row; ``--gate FILE`` for a
gate other than the package's). Every press gets every context and question. A family is held out if the demo does not
use it: gates are trained on neither kind, but they were judged by the demo's tasks during development. Errors are
standard errors over contexts.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvzip_press.leaderboard.analysis.summary import Cell, summarise
from kvzip_press.leaderboard.demo import GRID
from kvzip_press.leaderboard.progress import row_bar
from kvzip_press.leaderboard.rows.line_file import keep_aside
from kvzip_press.leaderboard.rows.results import Row, RowWriter
from kvzip_press.leaderboard.running.grid import load_grid
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, count_rows, plan
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.leaderboard.tasks import TASKS, get_task
from kvzip_press.loading.by_name import load_on
from kvzip_press.terminal import plain

REMOVED = (0.5, 0.7)
PEERS = ("kvzip", "snapkv", "expected_attention", "knorm", "random")


def main(
    contexts: Annotated[int, typer.Option(help="Contexts a task.")] = 25,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 450,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Further tasks; several times. Default: all that the demo does not show.")
    ] = None,
    gate: Annotated[Path | None, typer.Option(help="A file of gates. Default: the package's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 23,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
    rows: Annotated[Path, typer.Option(help="Where the rows go; a file there is kept aside.")] = Path(
        "outputs/gates/rows.jsonl"
    ),
) -> None:
    """Runs the comparison and prints it, all tasks together and each by itself."""
    shown = load_grid(GRID).run.tasks
    names = {spec.task.name for spec in shown}
    others = held_out or [name for name in TASKS if name not in names]
    specs = [replace(spec, n_contexts=contexts, length_tokens=tokens) for spec in shown]
    specs += [TaskSpec(get_task(name), contexts, tokens) for name in others]
    gated = PressSpec("fastkvzip", "gated", {} if gate is None else {"gate": str(gate)})
    full = PressSpec("none", "full cache", compression_ratios=(0.0,))
    run = Run(model, tuple(specs), (full, gated, *(PressSpec(name, name) for name in PEERS)), REMOVED, seed)
    found = _measure(run, device, rows)
    for name in ("all tasks", *(spec.task.name for spec in specs)):
        cells = summarise(row for row in found if name in ("all tasks", row.task))
        note = " (held out)" if name in others else ""
        Console().print(_table(cells, f"{name}{note}: {cells[0].n_questions} questions a row, seed {seed}"))


def _measure(run: Run, device: str | None, path: Path) -> list[Row]:
    loaded, tokenizer = load_on(run.model_name, device)
    works, found = plan(run, tokenizer), []
    keep_aside([path])
    with RowWriter(path) as writer, row_bar(Console(), count_rows(run, works)) as on_row:
        for row in execute(run, works, loaded, tokenizer):
            writer.write(row)
            found.append(row)
            on_row(row)
    return found


def _table(cells: list[Cell], title: str) -> Table:
    table = Table("press", "removed", "accuracy", "kept", "compress s", title=plain(title, "table.title"))
    for cell in cells:
        error = "" if cell.standard_error is None else f" ± {cell.standard_error:.3f}"
        figures = (f"{cell.accuracy:.3f}{error}", f"{cell.kept_fraction:.2f}", f"{cell.compress_seconds:.3f}")
        table.add_row(plain(cell.press), f"{cell.compression_ratio:.1f}", *figures)
    return table


if __name__ == "__main__":
    typer.run(main)
