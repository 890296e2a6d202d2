"""``kvzip-press gates``: trains gates that predict KVzip's scores."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvzip_press.errors import DiskFullError, InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.files import sweep_temporaries
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption, load
from kvzip_press.locks import Lock
from kvzip_press.terminal import printable, progress

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Gates of a model's layers, for the press fastkvzip."
)


@app.callback()
def _commands() -> None:
    """Gates of a model's layers, for the press fastkvzip."""


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.")],
    model: ModelOption,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A text file, a .jsonl file with a text a line, or a hub data set; several times."),
    ] = None,
    self_generated: Annotated[
        bool, typer.Option("--self-generated", help="Text sampled from the model itself instead of --data.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to train on.")] = 1_000_000,
    held_out_tokens: Annotated[int, typer.Option("--held-out-tokens", help="Tokens to evaluate with.")] = 20_000,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.")] = 5000,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 0.2,
    dim: Annotated[int, typer.Option("--dim", help="Dimensions of a gate.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    weighting: Annotated[
        str | None, typer.Option("--weighting", help="Of the teacher's rows: surprisal or probability; default none.")
    ] = None,
    piece_tokens: Annotated[int, typer.Option("--piece-tokens", help="Most tokens that are read at a time.")] = 16384,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Texts sampled at a time; default 512 on a GPU, 32 on a CPU.")
    ] = None,
    disk_gb: Annotated[float, typer.Option("--disk-gb", help="Most disk for features; the rest goes in rounds.")] = 20,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", help="Where to make a folder for what is under way, removed afterwards. Default OUT.work."
        ),
    ] = None,
    keep_work: Annotated[bool, typer.Option("--keep-work/--no-keep-work", help="Leave that folder.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Trains gates for a model: KVzip is the teacher, and they learn from the hidden states of texts.

    A run that was killed continues where it was when the same command is given again. The model itself is not changed.
    Only what the run made is removed; another run that writes the same file at the same time is refused.
    """
    if bool(data) == self_generated:
        raise InvalidArgumentError("expected one of --data and --self-generated, got both or none")
    from kvzip_press.presses.fastkvzip import training

    parent = work if work is not None else out.with_name(out.name + ".work")
    _check_places(out, parent, data or [])
    recipe = training.Recipe(
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        steps=steps,
        lr=lr,
        dim=dim,
        seed=seed,
        piece_tokens=piece_tokens,
        disk_bytes=int(disk_gb * 1e9),
        weighting=weighting,
    )
    loaded, tokenizer = load(model, device, dtype)
    with _alone(out) as lock, _shown() as (on_progress, seconds):
        folder = training.WorkFolder.inside(parent, out)
        found = None if self_generated else training.texts_of(data or [], tokenizer, recipe)
        with folder.held():
            found = found or training.self_generated(
                loaded, tokenizer, recipe, folder.path / "sampled", batch_size=batch_size, progress=on_progress
            )
            gates, agreement = training.Training(loaded, tokenizer, recipe, *found, folder, on_progress).run()
            lock.check()
            folder.check()
            gates.save(out)
            if not keep_work:
                folder.remove()
    _report(agreement, seconds)
    typer.echo(printable(f"{out}: {gates!r}, {out.stat().st_size / 1e6:.1f} MB"))


def _check_places(out: Path, parent: Path, data: list[str]) -> None:
    """Raises at once for what would fail, or destroy a text, hours later."""
    if out.is_dir() or out.absolute() == parent.absolute():
        raise InvalidArgumentError(f"expected --out to be a file to write, got the folder {out}")
    if out.exists() and any(Path(one).exists() and out.samefile(one) for one in data):
        raise InvalidArgumentError(f"expected --out to be another file than --data, got {out} for both")


@contextmanager
def _alone(out: Path) -> Iterator[Lock]:
    """Keeps other runs from writing the same file, and names the file in errors of the disk."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Lock(out.with_name(f".{out.name}.kvzip-press.lock"), f"the training of {out}") as lock:
            sweep_temporaries(out.parent)
            yield lock
    except KVzipPressError:
        raise
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else RunDirectoryError
        raise kind(f"expected to write what the training of {out} needs, got {error}") from error


@contextmanager
def _shown() -> Iterator[tuple[Callable[[str, int, int, str], None], dict[str, float]]]:
    """Shows how far each stage is, and yields its callback and the seconds that each stage took."""
    from rich.console import Console

    seconds: dict[str, float] = {}
    last = time.perf_counter()
    with progress(Console(), transient=False) as show:

        def on_progress(stage: str, done: int, total: int, remark: str) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds[stage] = seconds.get(stage, 0.0) + now - last
            last = now
            show(stage, done, total, remark)

        yield on_progress, seconds


def _report(agreement: Any, seconds: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "loss", "agreement", "rank correlation")
    columns = (agreement.loss, agreement.agreement, agreement.rank_correlation)
    for layer_idx, *values in zip(agreement.layer_indices, *columns, strict=True):
        table.add_row(str(layer_idx), *(f"{value:.3f}" for value in values))
    means = ", ".join(f"{name} {value:.3f}" for name, value in agreement.summary.items())
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    Console().print(table, f"held out, {agreement.tokens} tokens: {means}\n{times}", markup=False)
