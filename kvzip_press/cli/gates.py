"""``kvzip-press gates``: trains gates that predict KVzip's scores, or how long TrimKV keeps a pair."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvzip_press.cli.outputs import check_file_to_write
from kvzip_press.errors import DiskFullError, InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.files import check_writable, sweep_temporaries
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption, load
from kvzip_press.locks import Lock
from kvzip_press.terminal import printable, progress

METHODS = ("fastkvzip", "trimkv")

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Gates of a model's layers, for the presses fastkvzip and trimkv."
)


@app.callback()
def _commands() -> None:
    """Gates of a model's layers, for the presses fastkvzip and trimkv."""


@app.command()
def train(
    out: Annotated[
        Path, typer.Option("--out", help="The safetensors file to write; of trimkv the folder, laid out as released.")
    ],
    model: ModelOption,
    method: Annotated[
        str, typer.Option("--method", help="fastkvzip, or trimkv: gates for presses that evict while the model writes.")
    ] = "fastkvzip",
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A text file, a .jsonl file with a text a line, or a hub data set; several times."),
    ] = None,
    self_generated: Annotated[
        bool, typer.Option("--self-generated", help="Text sampled from the model itself instead of --data.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to train on.")] = 1_000_000,
    held_out_tokens: Annotated[int, typer.Option("--held-out-tokens", help="Tokens to evaluate with.")] = 20_000,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = 5000,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate; default 0.2, of trimkv 0.001.")] = None,
    dim: Annotated[
        int | None, typer.Option("--dim", min=1, help="Dimensions of a gate; default 16, of trimkv 512.")
    ] = None,
    memory_size: Annotated[
        int | None,
        typer.Option("--memory-size", min=1, help="Of trimkv: pairs of a head that are worth keeping; default 512."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="Of trimkv: attention, the default, by forward passes alone; or distillation, the paper's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn.")] = 0,
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

    With --method trimkv the teacher is what the full cache still looks at, later in the text (--objective attention),
    or what the model says with it (--objective distillation), which goes back through the whole model.
    """
    _check_method(method, {"--memory-size": memory_size, "--objective": objective}, {"--weighting": weighting})
    _check_above_0({"--lr": lr, "--disk-gb": disk_gb})
    if bool(data) == self_generated:
        raise InvalidArgumentError("expected one of --data and --self-generated, got both or none")
    from kvzip_press.presses.decoding.trimkv.recipe import ATTENTION, TrimKVRecipe
    from kvzip_press.presses.fastkvzip import training
    from kvzip_press.training.folder import WorkFolder

    parent = work if work is not None else out.with_name(out.name + ".work")
    _check_places(out, parent, data or [], is_folder=method == "trimkv")
    trimkv = TrimKVRecipe(
        512 if memory_size is None else memory_size,
        512 if dim is None else dim,
        steps,
        1e-3 if lr is None else lr,
        seed=seed,
        objective=ATTENTION if objective is None else objective,
    )
    recipe = training.Recipe(
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        steps=steps,
        lr=0.2 if lr is None else lr,
        dim=16 if dim is None else dim,
        seed=seed,
        piece_tokens=piece_tokens,
        disk_bytes=int(disk_gb * 1e9),
        weighting=weighting,
    )
    loaded, tokenizer = load(model, device, dtype)
    with _alone(out) as lock, _shown() as (on_progress, seconds):
        folder = WorkFolder.inside(parent, out)
        found = None if self_generated else training.texts_of(data or [], tokenizer, recipe)
        with folder.held():
            found = found or training.self_generated(
                loaded, tokenizer, recipe, folder.path / "sampled", batch_size=batch_size, progress=on_progress
            )
            if method == "trimkv":
                save, report = _trained_trimkv(loaded, trimkv, found[0], (out, model), folder, on_progress)
            else:
                save, report = _trained_fastkvzip(
                    training.Training(loaded, tokenizer, recipe, *found, folder, on_progress), out
                )
            lock.check()
            folder.check()
            save()
            if not keep_work:
                folder.remove()
    report(seconds)


Trained = tuple[Callable[[], None], Callable[[dict[str, float]], None]]
"""What saves gates, and what then tells about them, given the seconds that each stage took."""


def _trained_fastkvzip(training: Any, out: Path) -> Trained:
    gates, agreement = training.run()

    def report(seconds: dict[str, float]) -> None:
        _report(agreement, seconds)
        typer.echo(printable(f"{out}: {gates!r}, {out.stat().st_size / 1e6:.1f} MB"))

    return lambda: gates.save(out), report


def _trained_trimkv(
    model: Any,
    recipe: Any,
    data: tuple[Any, Any],
    out: tuple[Path, str],
    folder: Any,
    on_progress: Callable[[str, int, int, str], None],
) -> Trained:
    from kvzip_press.presses.decoding.trimkv.training import train as train_trimkv

    path, name = out
    texts, held_out = ([piece.ids for piece in some] for some in data)
    gates, found = train_trimkv(model, recipe, texts, held_out, on_progress, folder=folder)

    def report(_: dict[str, float]) -> None:
        typer.echo(
            printable(f"{path}: {gates!r}; ") + f"of the pairs worth keeping in held-out texts the gates keep "
            f"{found.gates:.1%}, and the newest pairs are {found.newest:.1%} of them; loss {found.loss:.3f}"
        )

    return lambda: gates.save(path, base_model=name, memory_size=recipe.memory_size), report


def _check_method(method: str, of_trimkv: dict[str, Any], of_fastkvzip: dict[str, Any]) -> None:
    """Raises for a method that there is not, and for options that the method would not look at."""
    if method not in METHODS:
        raise InvalidArgumentError(f"expected --method to be one of {METHODS}, got {method!r}")
    foreign = of_fastkvzip if method == "trimkv" else of_trimkv
    given = [name for name, value in foreign.items() if value is not None]
    if given:
        (other,) = (one for one in METHODS if one != method)
        raise InvalidArgumentError(
            f"expected options of --method {method}, got {' and '.join(given)}, which are of --method {other}"
        )


def _check_above_0(given: dict[str, float | None]) -> None:
    """Raises for an option that is given and not above 0, by the name that was typed; the recipe calls it otherwise."""
    for name, value in given.items():
        if value is not None and not value > 0:
            raise InvalidArgumentError(f"expected {name} above 0, got {value}")


def _check_places(out: Path, work: Path, data: list[str], *, is_folder: bool) -> None:
    """Raises at once for what would fail, or destroy a text or a model's config, hours later."""
    from kvzip_press.presses.decoding.trimkv.gates import WEIGHTS, check_is_for_gates

    if is_folder:
        check_writable(out / WEIGHTS, "what is written into the folder --out", parents=True)
        check_is_for_gates(out)
        return
    check_file_to_write(out, data, named="--data")
    if out.absolute() == work.absolute():
        raise InvalidArgumentError(f"expected --work to be another place than --out, got {out} for both")


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
        table.add_row(str(layer_idx), *(f"{value:z.3f}" for value in values))
    means = ", ".join(f"{name} {value:z.3f}" for name, value in agreement.summary.items())
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    Console().print(table, f"held out, {agreement.tokens} tokens: {means}\n{times}", markup=False)
