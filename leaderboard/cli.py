"""``kvzip-press leaderboard``: runs, tables, pages, exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.terminal import printable

if TYPE_CHECKING:
    from kvzip_press.leaderboard.running.plan import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Runs that compare presses on tasks, and what is made of their rows.",
)

DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a run.")]


@app.command()
def run(
    grid: Annotated[str, typer.Option("--grid", help="Name of a grid (see `list`), or a YAML file.")],
    output: Annotated[Path, typer.Option("--output", help="The run's directory; a run that is there is continued.")],
    model: Annotated[str | None, typer.Option("--model", help="Instead of the grid's.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:1; default the GPU if any.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32, instead of the grid's.")] = None,
    contexts: Annotated[
        int | None, typer.Option("--contexts", help="Contexts of each task; default the grid's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Contexts in one forward.")] = None,
    query_aware: Annotated[
        bool | None, typer.Option("--query-aware/--query-agnostic", help="Whether questions are known beforehand.")
    ] = None,
    truncate: Annotated[
        bool | None, typer.Option("--truncate/--no-truncate", help="Whether contexts that are too long are cut.")
    ] = None,
    shard: Annotated[str, typer.Option("--shard", help="I/N: only contexts I, I+N ...; see `merge`.")] = "0/1",
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            help="serial; processes or ray: spread over workers, here or on a cluster; openai: a server answers.",
        ),
    ] = "serial",
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Of processes, which share the GPUs, or of ray, each with one; default 1."),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Of a Ray cluster, or of the server; default this machine.")
    ] = None,
    skip_unavailable: Annotated[
        bool, typer.Option("--skip-unavailable", help="Leave presses out whose package, gates or scores are absent.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin again; old rows are kept aside.")] = False,
) -> None:
    """Runs a grid, or continues one: a killed run loses only the context that it was working on."""
    from kvzip_press.leaderboard.launch import launch, launch_spread
    from kvzip_press.leaderboard.running.grid import load_grid

    asked: dict[str, Any] = {
        "model_name": model,
        "dtype": dtype,
        "batch_size": batch_size,
        "query_aware": query_aware,
        "truncate": truncate,
    }
    chosen = replace(load_grid(grid).run, **{name: value for name, value in asked.items() if value is not None})
    chosen, shard_of = _with_contexts(chosen, contexts), _shard(shard)
    _check_executor(executor, {"--workers": workers is not None, "--address": address is not None})
    options: dict[str, Any] = {"shard_of": shard_of, "skip_unavailable": skip_unavailable, "force": force}
    if executor == "openai":
        options["address"] = address or "http://localhost:8000"
    if executor in ("serial", "openai"):
        launch(chosen, output, device=device, **options)
        return
    n_workers = 1 if workers is None else workers
    launch_spread(chosen, output, executor=executor, workers=n_workers, address=address, device=device, **options)


@app.command()
def table(
    directory: DirectoryArgument,
    form: Annotated[
        str, typer.Option("--format", help="terminal; or markdown or latex, for a paper: presses by ratio.")
    ] = "terminal",
) -> None:
    """Prints the table of a run."""
    from kvzip_press.leaderboard.show import print_table, written_tables

    if form == "terminal":
        print_table(directory)
    else:
        for line in written_tables(directory, form).splitlines():
            typer.echo(printable(line))


@app.command()
def compare(
    directory: DirectoryArgument,
    press: Annotated[
        str | None, typer.Option("--press", help="Only this press: intervals, by kind of text and task by task.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="What presses are compared with besides the full cache; default KVzip."),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="terminal; or markdown or latex, for a paper.")] = "terminal",
) -> None:
    """Compares the presses of a run: tasks that count, accuracies, paired differences, what was kept, storages."""
    from kvzip_press.leaderboard.show import compared_tables

    for line in compared_tables(directory, form, reference=reference, press=press).splitlines():
        typer.echo(printable(line))


@app.command()
def reuse(
    directory: DirectoryArgument,
    form: Annotated[str, typer.Option("--format", help="terminal; or markdown or latex, for a paper.")] = "terminal",
    questions: Annotated[
        str, typer.Option("--questions", help="Numbers of questions about one context, rising.")
    ] = "1,8,64,512",
) -> None:
    """Prints the seconds of many questions about one context: compressed once, kept whole, or read anew each time."""
    from kvzip_press.leaderboard.show import reuse_tables

    parts = [part.strip() for part in questions.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InvalidArgumentError(
            f"expected --questions as rising numbers of questions from 1 on, such as 1,8,64, got {questions!r:.80}"
        )
    numbers = [int(part) for part in parts]
    for line in reuse_tables(directory, form, numbers).splitlines():
        typer.echo(printable(line))


@app.command()
def summary(
    directory: DirectoryArgument,
    output: Annotated[Path, typer.Option("--output", help="The JSON file to write.")],
) -> None:
    """Writes what a run came to in one file, with hashes of its configuration and its rows."""
    from kvzip_press.files import check_writable
    from kvzip_press.leaderboard.run_summary import RunSummary

    check_writable(output, "--output")
    made = RunSummary.of(directory)
    made.save(output)
    typer.echo(printable(f"{made.n_rows} rows, sha256 {made.rows_sha256[:16]}: {output}"))


@app.command()
def verify(
    directory: DirectoryArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `summary` wrote about it.")],
) -> None:
    """Computes the summary of a run again, and every score from its prediction; fails if anything differs."""
    from kvzip_press.leaderboard.run_summary import verify as verified

    typer.echo(printable(verified(directory, file)))


@app.command()
def correlate(
    directory: DirectoryArgument,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The directory of a run of another model.")],
) -> None:
    """Says how far the ranking of presses in one run foretells that in another."""
    from kvzip_press.leaderboard.show import print_correlation

    print_correlation(directory, other)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Directories of runs; the page shows one model at a time.")
    ],
    output: Annotated[Path, typer.Option("--output", help="The HTML file to write.")],
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Also a directory for PNGs.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Stands above the page.")] = None,
    command: Annotated[str, typer.Option("--command", help="What made the rows; stands at the end of the page.")] = "",
) -> None:
    """Writes whole runs, of any models, as one HTML page, which a browser can show without a network."""
    from kvzip_press.files import check_writable
    from kvzip_press.leaderboard.report import write_report
    from kvzip_press.leaderboard.run_files import heads_of, incomplete, rows_of

    check_writable(output, "--output", parents=True)
    of_runs = {directory: (rows_of(directory), heads_of(directory)) for directory in directories}
    rows = [row for its_rows, _ in of_runs.values() for row in its_rows]
    heads = [line for _, its_heads in of_runs.values() for line in its_heads]
    write_report(rows, heads, output, title=title, command=command)
    for directory, (its_rows, its_heads) in of_runs.items():
        if note := incomplete(directory, its_rows, its_heads):
            typer.echo(printable(f"{directory}: {note}" if len(of_runs) > 1 else note))
    typer.echo(printable(f"page: {output}"))
    if pictures is not None:
        from kvzip_press.leaderboard.pictures import save_all

        save_all(rows, heads, pictures)
        typer.echo(printable(f"pictures: {pictures}"))


@app.command()
def export(
    directory: DirectoryArgument,
    output: Annotated[Path, typer.Option("--output", help="The folder to write.")],
    form: Annotated[str, typer.Option("--format", help="kvpress: the folders of its leaderboard.")] = "kvpress",
    data_dir: Annotated[
        str | None,
        typer.Option("--data-dir", help="The part of the data set; runs of RULER know theirs."),
    ] = None,
) -> None:
    """Writes a run in another leaderboard's format."""
    from kvzip_press.leaderboard.kvpress_format import data_sets_of, export_rows, notes_for_board
    from kvzip_press.leaderboard.run_files import config_of, incomplete, rows_of

    if form != "kvpress":
        raise InvalidArgumentError(f"expected --format kvpress, got {form!r}")
    rows = rows_of(directory)
    data_sets = {row.task: (row.task, data_dir) for row in rows} | data_sets_of(config_of(directory))
    export_rows(rows, output, data_sets=data_sets)
    for note in notes_for_board(rows, data_sets):
        typer.echo(printable(note))
    if note := incomplete(directory, rows):
        typer.echo(printable(note))
    typer.echo(printable(f"folders: {output}"))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folders of kvpress's leaderboard.")],
    output: Annotated[Path, typer.Option("--output", help="The directory for their rows.")],
) -> None:
    """Reads folders of kvpress's leaderboard and stores them as our rows."""
    from kvzip_press.leaderboard.kvpress_format import import_rows
    from kvzip_press.leaderboard.run_files import store

    count = store(import_rows(folder), output)
    typer.echo(printable(f"{count} rows: {output}"))


@app.command()
def merge(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of one run's shards.")],
    output: Annotated[Path, typer.Option("--output", help="The directory of the whole.")],
) -> None:
    """Joins the shards of a run."""
    from kvzip_press.leaderboard.running.shards import merge as merge_shards
    from kvzip_press.leaderboard.show import print_table

    merge_shards(directories, output)
    print_table(output)


@app.command("list")
def list_() -> None:
    """Lists grids, tasks and presses."""
    from kvzip_press.leaderboard.running.grid import grid_names, load_grid
    from kvzip_press.leaderboard.tasks import TASKS
    from kvzip_press.registry import press_names

    typer.echo("grids")
    for name in grid_names():
        typer.echo(f"  {name:16} {load_grid(name).description}")
    for title, names in (("tasks", sorted(TASKS)), ("presses", press_names())):
        typer.echo(title)
        for name in names:
            typer.echo(printable(f"  {name}"))


def _with_contexts(chosen: Run, contexts: int | None) -> Run:
    if contexts is None:
        return chosen
    return replace(chosen, tasks=tuple(replace(spec, n_contexts=contexts) for spec in chosen.tasks))


def _check_executor(executor: str, given: Mapping[str, bool]) -> None:
    """Raises InvalidArgumentError for an executor that is not known, or an option that it would not look at."""
    takes = {"serial": "", "processes": "--workers", "ray": "--workers --address", "openai": "--address"}
    if executor not in takes:
        raise InvalidArgumentError(f"expected --executor to be one of {', '.join(takes)}, got {executor!r}")
    for option in given:
        if given[option] and option not in takes[executor]:
            those = " or ".join(name for name in takes if option in takes[name])
            raise InvalidArgumentError(f"expected {option} with --executor {those}, got it with {executor!r}")


def _shard(text: str) -> tuple[int, int]:
    from kvzip_press.leaderboard.running.plan import check_shard

    index, slash, count = text.partition("/")
    if not slash or not index.isdigit() or not count.isdigit():
        raise InvalidArgumentError(f"expected --shard I/N, such as 0/4, got {text!r}")
    check_shard(int(index), int(count))
    return int(index), int(count)
