"""Measures vLLM with compressed contexts beside vLLM alone: the table of serving, in one command.

``python -m kvzip_press.leaderboard.benchmarks.serving --output outputs/serving``

Each engine runs in a process of its own, baselines and ours one after another, and measures its rows. A figure is
written when it is known (``figures.jsonl``), and what an engine says goes to a log beside it. If one dies or takes too
long, its next rows are measured by a new one; the command, given again, measures what is missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.benchmarks.serving_engine import SHAPES, Job, Load, note
from kvzip_press.terminal import plain


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: What it says.
        baselines: Engines of vLLM alone; the first is the one that ours is compared with.
        ours: Engines with our pool.
        bar: What ours is to reach.
    """

    title: str
    baselines: tuple[str, ...]
    ours: tuple[str, ...]
    bar: str


ROWS = {
    "resident": Row("distinct contexts resident", ("full",), ("ours", "ours-int8"), "70; int8 140"),
    "distinct": Row(
        "tokens/s, users on distinct contexts", ("full",), ("ours", "ours-int8", "ours-v1", "ours-v2"), "2000, 2.2 x"
    ),
    "one": Row(
        "tokens/s, users on one context", ("plain", "cascade"), ("ours", "ours-int8", "ours-v1", "ours-v2"), "6000, 5 x"
    ),
    "idle": Row(
        "step of plain requests, ms",
        ("plain", "plain-v1", "plain-v2"),
        ("ours", "ours-v1", "ours-v2"),
        "1.03 x at most",
    ),
    "first": Row("first token about a context, ms", ("plain",), ("ours",), "below 50"),
}
ENGINES = ("ours", "plain", "full", "ours-int8", "cascade")  # in this order: what matters most comes first
RUNNERS = ("plain-v1", "ours-v1", "plain-v2", "ours-v2")  # on each of vLLM's model runners, when they are asked for


def main(
    output: Annotated[Path, typer.Option(help="Folder for figures and logs.")],
    rows: Annotated[str, typer.Option(help=f"Some of {', '.join(ROWS)}, with commas.")] = ",".join(ROWS),
    engines: Annotated[str, typer.Option(help=f"Some of {', '.join((*ENGINES, *RUNNERS))}, with commas.")] = ",".join(
        ENGINES
    ),
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama3.1-8b",
    users: Annotated[int, typer.Option(help="Requests at a time.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens of a context.")] = 32768,
    kept: Annotated[float, typer.Option(help="Fraction of pairs kept.")] = 0.3,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    pool_gb: Annotated[float, typer.Option(help="Memory for contexts, in 1e9 bytes.")] = 100.0,
    memory: Annotated[float, typer.Option(help="Fraction of the GPU that vLLM takes in all.")] = 0.92,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="vLLM's compiled model; graphs always.")
    ] = True,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the heads.")] = 1,
    seconds: Annotated[float, typer.Option(help="Most seconds of an engine, its start included.")] = 540.0,
) -> None:
    """Measures what is missing, engine by engine, and prints the table of all that is known."""
    _check(shape, rows, ROWS)
    _check(shape, engines, (*ENGINES, *RUNNERS))
    job = Job("", shape, Load(users, context, kept, answer=answer), pool_gb, memory, compiled, tensor_parallel)
    output.mkdir(parents=True, exist_ok=True)
    for engine in engines.split(","):
        measure(replace(job, engine=engine), rows.split(","), output, seconds)
    Console().print(table(job, output))


def _check(shape: str, asked: str, known: Sequence[str] | dict[str, Row]) -> None:
    if shape not in SHAPES:
        raise InvalidArgumentError(f"expected a shape out of {', '.join(SHAPES)}, got {shape!r:.80}")
    if unknown := [name for name in asked.split(",") if name not in known]:
        raise InvalidArgumentError(f"expected some of {', '.join(known)}, with commas, got {unknown[0]!r:.80}")


def measure(job: Job, rows: Sequence[str], output: Path, seconds: float) -> None:
    """Measures the rows of an engine that are missing. One in which it dies is noted as failed, and left out."""
    figures, failed = output / "figures.jsonl", set[str]()
    while left := [row for row in _rows_of(job.engine, rows) if row not in {*known(job, figures), *failed}]:
        typer.echo(f"{job.engine}: {', '.join(left)}")
        ended = run(job, left, figures, output / f"{job.engine}.log", seconds)
        first = next((row for row in left if row not in known(job, figures)), None)
        if first is None:
            return
        failed.add(first)
        note(figures, job, first, {"error": ended})
        typer.echo(f"{job.engine}, {first}: {ended}, see {output / job.engine}.log")


def run(job: Job, rows: Sequence[str], figures: Path, log: Path, seconds: float) -> str:
    """Runs an engine in a process of its own, whose output goes to a log, and returns how it ended."""
    asked = json.dumps({"job": asdict(job), "rows": list(rows), "output": str(figures)})
    command = [sys.executable, "-m", "kvzip_press.leaderboard.benchmarks.serving_engine", asked]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return f"no end after {seconds:g} s"
        finally:  # with all that it started: memory of a GPU is free only when the last of them has gone
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def known(job: Job, figures: Path) -> dict[str, float]:
    """Returns the figures of an engine that were measured with the same settings, by row; the last one counts."""
    lines = figures.read_text(encoding="utf-8").splitlines() if figures.exists() else []
    found = [json.loads(line) for line in lines]
    settings = json.loads(json.dumps(job.settings()))
    return {
        one["row"]: one["figure"] for one in found if "figure" in one and all(one[k] == v for k, v in settings.items())
    }


def _rows_of(engine: str, rows: Sequence[str]) -> list[str]:
    return [name for name in ROWS if name in rows and engine in (*ROWS[name].baselines, *ROWS[name].ours)]


def table(job: Job, output: Path) -> Table:
    """Returns the table: each engine's figure, ours over the baseline, and what is to be reached."""
    found = {engine: known(replace(job, engine=engine), output / "figures.jsonl") for engine in (*ENGINES, *RUNNERS)}
    engines = [engine for engine in found if engine in ENGINES or found[engine]]
    shown = Table("", *engines, "ours / baseline", "to reach", box=None, pad_edge=False)
    for name, row in ROWS.items():
        figures: dict[str, Any] = {engine: found[engine].get(name) for engine in engines}
        base, own = figures[row.baselines[0]], figures["ours"]
        share = f"{own / base:.2f}" if own is not None and base else ""
        cells = ["" if figures[engine] is None else f"{figures[engine]:.1f}" for engine in engines]
        shown.add_row(plain(row.title), *cells, share, row.bar)
    return shown


if __name__ == "__main__":
    typer.run(main)
