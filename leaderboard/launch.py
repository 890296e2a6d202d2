"""The work behind ``leaderboard run``: a grid goes into a directory, in this process or spread over workers."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvzip_press.files import check_writable
from kvzip_press.leaderboard.progress import quiet_loading, row_bar
from kvzip_press.leaderboard.running.availability import available, check_files
from kvzip_press.leaderboard.running.endpoint import Endpoint
from kvzip_press.leaderboard.running.plan import Run, Work, count_rows, plan, shard
from kvzip_press.leaderboard.running.process_executor import places, process_workers
from kvzip_press.leaderboard.running.ray_executor import Cluster, ray_workers
from kvzip_press.leaderboard.running.run_directory import LOCK, RunDirectory, RunRecord
from kvzip_press.leaderboard.running.shards import run_shard
from kvzip_press.leaderboard.running.spread import Workers, spread
from kvzip_press.leaderboard.show import print_table
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


def _count_done(directory: RunDirectory, works: Iterable[Work]) -> int:
    """Counts the rows of these contexts that the directory has."""
    samples = {(work.task.name, work.sample.sample_id) for work in works}
    return sum((key.task, key.sample_id) in samples for key in directory.done)
