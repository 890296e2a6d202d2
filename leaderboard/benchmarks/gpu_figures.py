"""Every figure of the documents that needs a GPU, one after the other, each in a process of its own.

``python -m kvzip_press.leaderboard.benchmarks.gpu_figures --out figures --minutes 28`` (or ``make figures-gpu``) runs
what is not done yet and stops before the time is over, so that a GPU that is lent for half an hour is enough: give the
same command again, and it goes on. ``--list`` says what there is and which pages it is for; ``--only NAME`` runs some.

Figures whose times count have a GPU to themselves. If there are several GPUs, the first runs these, one after the
other, and the others the rest at the same time; ``--workers N`` runs a grid, or another figure whose times do not
count and that can be spread, in N processes, which share those GPUs.

A figure's output is in ``figures/NAME.log`` as it is printed, its files in ``figures/NAME/``, and how it ended, with
command, commit and seconds, in ``figures/NAME.json`` the moment that it ends. What failed or ran past its limit is run
again the next time, what succeeded only with ``--again`` or when its command has changed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvzip_press.errors import InvalidArgumentError, RunDirectoryError
from kvzip_press.files import replacing
from kvzip_press.kernels.benchmarks.report import commit
from kvzip_press.terminal import printable
from kvzip_press.untrusted import JSON_BYTES, parse_json, read_bytes

_KERNELS = "kvzip_press.kernels.benchmarks"
_BENCHMARKS = "kvzip_press.leaderboard.benchmarks"
_QWEN, _GEMMA = "Qwen/Qwen2.5-Coder-0.5B-Instruct", "gemma3-270m"
_SHORT = {"smollm2": "smollm2", _QWEN: "qwen05", _GEMMA: "gemma3"}  # in names of figures and of files
_BOTH = ("smollm2", _QWEN)  # models of comparisons of two
_COMMAND = ("-c", "from kvzip_press.cli.main import main; main()")  # kvzip-press, by the same Python
_FOLDER = "{folder}"  # in a command: the figure's own
_WORKERS = "{workers}"  # in a command: how a grid is spread over processes; nothing for one
_PROCESSES = "{processes}"  # the same of a benchmark
_GRACE = 20.0  # seconds between asking a process to end and ending it
DONE, FAILED, STOPPED = "done", "failed", "stopped"


@dataclass(frozen=True)
class Figure:
    """One command and what it is for.

    Attributes:
        name: Its name.
        command: The arguments of Python; ``{folder}`` is the folder for its files.
        minutes: The most that it may take.
        makes: The tables, files and claims that it makes again.
        goes_on: Whether a run that was stopped goes on where it was.
        times: Whether its times count, so that nothing else may run on its GPU.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    makes: str
    goes_on: bool = False
    times: bool = True


@dataclass(frozen=True)
class Ending:
    """How a figure ended, as its file says.

    Attributes:
        status: "done", "failed" or "stopped" (by its limit, or because the time was over).
        returncode: The process's; None if it was stopped.
        seconds: How long it ran.
        command: What was run, if by one process.
        commit: The commit of the repository.
    """

    status: str
    returncode: int | None
    seconds: float
    command: list[str]
    commit: str


def _kernel(name: str, minutes: float, makes: str = "", *, is_published: bool = True) -> Figure:
    command = ("-m", f"{_KERNELS}.{name}", "--output", f"{_FOLDER}/{name}-h200.csv")
    made = f"kernels/benchmarks/results/{name}-h200.csv; kernels/DESIGN.md{makes}"
    made = made if is_published else f"{makes}; no file of it is published"
    return Figure(f"kernel-{name.replace('_', '-')}", command, minutes, made)


def _bench(
    name: str, minutes: float, makes: str, *options: str, called: str = "", goes_on: bool = False, times: bool = True
) -> Figure:
    command = ("-m", f"{_BENCHMARKS}.{name}", *options)
    return Figure(called or name.replace("_", "-"), command, minutes, makes, goes_on=goes_on, times=times)


def _profile(shape: str, minutes: float, makes: str = "", *options: str) -> Figure:
    command = (*_COMMAND, "profile", "--shape", shape, "--compile", "--output", _FOLDER, *options)
    return Figure(f"profile-{shape}", command, minutes, f"leaderboard/profile/results/{shape}-h200.jsonl{makes}")


def _grid(name: str, minutes: float, makes: str) -> Figure:
    command = (*_COMMAND, "leaderboard", "run", "--grid", name, "--output", f"{_FOLDER}/run", _WORKERS)
    return Figure(f"grid-{name}", command, minutes, makes, goes_on=True, times=False)


def _made(kind: str, model: str, minutes: float, *command: str) -> Figure:
    """Returns what makes a file that a grid of a model needs, where that grid says that it is."""
    name = f"{kind}-{_SHORT[model]}"
    return Figure(name, (*_COMMAND, *command), minutes, f"a file that a grid of {model} needs", times=False)


def _of_evidence(model: str) -> tuple[Figure, Figure]:
    """Returns what makes the heads and the gates of a grid of the evidence."""
    heads, gates = (f"outputs/{kind}-{_SHORT[model]}.safetensors" for kind in ("heads", "gates"))
    return (
        _made("heads", model, 10, "heads", "compute", "--model", model, "--out", heads),
        _made(
            "gates", model, 15, "gates", "train", "--model", model, "--self-generated", "--tokens", "150000",
            "--out", gates,
        ),
    )  # fmt: skip


FIGURES = (
    _profile("llama3.1-8b", 15, "; README's table and the first of docs/performance.md"),
    _kernel("ragged_attention", 10, "; docs/performance.md, attention of a layer"),
    _kernel("codecs", 10),
    _kernel("context_attention", 10),
    _kernel("gathered_attention", 10),
    _kernel("kv_scoring", 10),
    _kernel("ragged_pack", 10),
    _kernel("replay_attention", 10),
    _kernel("recall_ranking", 10, "; docs/howto/recall.md, what ranking costs"),
    _kernel("near_duplicates", 10, "; docs/methods/decoding.md, what evicting costs"),
    _kernel("received_attention", 10, "kernels/DESIGN.md, what attention keys get", is_published=False),
    _kernel("row_codec", 10, "what encoding and decoding rows costs", is_published=False),
    _bench(
        "many_contexts", 10, "leaderboard/profile/results/many-contexts-h200.json; docs/performance.md, many contexts",
        "--shape", "llama3.1-8b", "--output", f"{_FOLDER}/many_contexts.json",
    ),
    _bench("recall_time", 10, "docs/howto/recall.md, the table of an H200", "--shape", "llama3.1-8b"),
    _bench(
        "eviction_cost", 10, "docs/performance.md, eviction while decoding; docs/methods/decoding.md",
        "--shape", "llama3.1-8b", "--budget", "4096", "--profile", f"{_FOLDER}/eviction-parts",
    ),
    _bench(
        "long_answers", 15, "docs/methods/decoding.md, rows that fit and tokens a second",
        "--shape", "llama3.1-8b", "--answer", "16384",
    ),
    _bench("weighting", 8, "docs/methods/kvzip.md, the cost of weighting", "--model", _QWEN, "--tokens", "16000"),
    _bench(
        "serving", 28, "docs/howto/serving.md, the table of users (needs vLLM)", "--output", f"{_FOLDER}/serving",
        goes_on=True,
    ),
    _bench("session", 8, "docs/howto/serving.md, without a server", "--shape", "llama3.1-8b"),
    *(
        _bench(
            "allocations", 12, f"leaderboard/results/allocations; docs/howto/budgets.md, allocations by {scorer}",
            "--model", model, "--scorer", scorer, "--task", "hidden_facts", "--contexts", "34", "--tokens", "1800",
            "--output", f"{_FOLDER}/allocations.json", _PROCESSES,
            called=f"allocations-{_SHORT[model]}-{scorer}", goes_on=True, times=False,
        )
        for model in _BOTH
        for scorer in ("kvzip", "snapkv", "expected_attention")
    ),
    _profile("qwen2.5-7b", 15),
    _profile("qwen3-8b", 15),
    _profile("gemma3-12b", 15, "; docs/performance.md, hybrid models"),
    *_of_evidence(_QWEN),
    *_of_evidence(_GEMMA),
    _grid("evidence", 30, f"leaderboard/results/evidence-qwen05; docs/leaderboard.md (needs {_QWEN}, heads and gates)"),
    _grid("evidence-gemma3", 30, f"leaderboard/results/evidence-gemma3; docs/leaderboard.md (needs {_GEMMA})"),
    _grid("evidence-smollm2", 30, "leaderboard/results/evidence-smollm2; docs/leaderboard.md"),
    _grid("real-v1", 30, f"all real text (needs {_QWEN})"),
    *(
        _bench(
            "sharing", 10, "leaderboard/results/sharing; docs/methods/kvsharer.md",
            "--model", model, "--contexts", "34", "--output", f"{_FOLDER}/sharing.json", _PROCESSES,
            called=f"sharing-{_SHORT[model]}", goes_on=True, times=False,
        )
        for model in _BOTH
    ),
    *(
        _bench(
            "shares", 10, "docs/howto/budgets.md, a searched table on text that it was not searched on",
            "--model", model, "--length", "2048", "--pieces", "60", "--output", f"{_FOLDER}/shares.json",
            called=f"shares-{_SHORT[model]}", times=False,
        )
        for model in _BOTH
    ),
    _made(
        "queries", _QWEN, 5, "queries", "calibrate", "--model", _QWEN, "--out", "outputs/queries-qwen05.safetensors",
    ),
    _made(
        "trimkv", _QWEN, 15, "gates", "train", "--method", "trimkv", "--model", _QWEN, "--self-generated",
        "--tokens", "150000", "--steps", "2000", "--out", "outputs/trimkv-qwen05",
    ),
    _grid("decode-qwen05", 30, f"long answers at budgets of 128 to 1024 (needs {_QWEN}, gates and queries)"),
    _grid("smollm2-full", 30, "leaderboard/results/smollm2-full; docs/leaderboard.md (needs kvpress)"),
    _grid("smollm2-storages", 30, "leaderboard/results/storages-smollm2; docs/howto/storages.md"),
    _grid("qwen05-storages", 30, f"leaderboard/results/storages-qwen05; docs/howto/storages.md (needs {_QWEN})"),
    _grid("weighting-qwen05", 30, f"leaderboard/results/weighting-qwen05; docs/methods/kvzip.md (needs {_QWEN})"),
)  # fmt: skip

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option("--out", help="The folder for logs, files and endings.")] = Path("figures"),
    only: Annotated[list[str] | None, typer.Option("--only", help="Name of a figure; several times.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Says what there is, and runs nothing.")] = False,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Stop before so many are over.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what is done.")] = False,
    workers: Annotated[int, typer.Option("--workers", help="Processes of what can be spread.")] = 1,
) -> None:
    """Makes the figures that need a GPU, as far as the time goes."""
    chosen = choose(FIGURES, only or ())
    if listing:
        for figure in chosen:
            typer.echo(f"{figure.name}\n  at most {figure.minutes:g} minutes; {figure.makes}\n  {shown(figure, out)}")
        return
    if minutes is not None and not minutes > 0:
        raise typer.BadParameter(f"expected --minutes above 0, got {minutes}")
    if workers < 1:
        raise typer.BadParameter(f"expected --workers of 1 or more, got {workers}")
    until = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        left = run_side_by_side(chosen, out, visible_gpus(), until=until, again=again, workers=workers)
    except (RunDirectoryError, InvalidArgumentError) as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(1) from error
    if left:
        typer.echo(f"not made yet: {', '.join(left)}; the same command goes on")
        raise typer.Exit(1)


def choose(figures: Sequence[Figure], names: Iterable[str]) -> list[Figure]:
    """Returns the figures of some names, or all.

    Raises:
        typer.BadParameter: A name is not known.
    """
    names, known = list(names), {figure.name: figure for figure in figures}
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"expected --only to be one of {', '.join(known)}, got {unknown[0]}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(figures)


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, each by the name that CUDA_VISIBLE_DEVICES has for it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(torch.cuda.device_count())] if named is None else named.split(",")


def run_side_by_side(
    figures: Sequence[Figure],
    out: Path,
    gpus: Sequence[str],
    *,
    until: float | None = None,
    again: bool = False,
    workers: int = 1,
) -> list[str]:
    """Does what :func:`run_all` does, with all but the first of several GPUs for figures whose times do not count.

    Args:
        figures: What to run.
        out: The folder; created if it does not exist.
        gpus: The GPUs, by name.
        until: As in :func:`run_all`.
        again: As in :func:`run_all`.
        workers: As in :func:`run_all`.

    Raises:
        RunDirectoryError: The folder cannot be written.
    """
    if len(gpus) < 2:
        return run_all(figures, out, until=until, again=again, workers=workers)
    lanes = [([one for one in figures if one.times], gpus[:1]), ([one for one in figures if not one.times], gpus[1:])]
    with ThreadPoolExecutor(len(lanes)) as pool:
        ends = [
            pool.submit(run_all, lane, out, until=until, again=again, workers=workers, gpus=",".join(names))
            for lane, names in lanes
        ]
        return [name for end in ends for name in end.result()]


def run_all(
    figures: Sequence[Figure],
    out: Path,
    *,
    until: float | None = None,
    again: bool = False,
    workers: int = 1,
    gpus: str | None = None,
) -> list[str]:
    """Runs figures one after the other, and returns the names of those that are not made.

    One that would not end in what is left of the time, by its limit, is left out, unless it can go on; smaller ones
    behind it are still tried.

    Args:
        figures: What to run.
        out: The folder; created if it does not exist.
        until: When the time is over, on `time.monotonic`'s clock; None for never.
        again: Whether to run what is done, too.
        workers: Processes of a figure that can be spread.
        gpus: The GPUs that they see, with commas; None for those that this process sees.

    Raises:
        RunDirectoryError: The folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"expected --out to be a folder to write, got {out}: {error.strerror}") from error
    left = []
    for figure in figures:
        if not again and is_done(figure, out):
            typer.echo(f"{figure.name}: done before")
            continue
        seconds = 60 * figure.minutes
        rest = seconds if until is None else until - time.monotonic() - _GRACE
        if rest < seconds and not (figure.goes_on and rest > 0):
            typer.echo(f"{figure.name}: left out, {max(rest, 0):.0f} of its {seconds:.0f} seconds are left")
            left.append(figure.name)
            continue
        ending = run_one(figure, out, min(seconds, rest), workers=workers, gpus=gpus)
        typer.echo(f"{figure.name}: {ending.status} after {ending.seconds:.0f} s, {out / figure.name}.log")
        if ending.status != DONE:
            left.append(figure.name)
    return left


def is_done(figure: Figure, out: Path) -> bool:
    """Returns whether a figure was made by the command that it has now."""
    file = out / f"{figure.name}.json"
    try:
        found = parse_json(read_bytes(file, max_bytes=JSON_BYTES))
    except (OSError, ValueError):  # not there, or not whole: it is made again
        return False
    return isinstance(found, dict) and found.get("status") == DONE and found.get("command") == _command(figure, out)


def run_one(figure: Figure, out: Path, limit: float, *, workers: int = 1, gpus: str | None = None) -> Ending:
    """Runs a figure in a process of its own, ended with all its children at the limit; writes how it ended.

    Args:
        figure: What to run.
        out: The folder.
        limit: Seconds.
        workers: Processes of a figure that can be spread.
        gpus: The GPUs that it sees, with commas; None for those that this process sees.

    Raises:
        RunDirectoryError: Something cannot be written.
    """
    (out / figure.name).mkdir(exist_ok=True)
    begin, seen = time.monotonic(), {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    with (out / f"{figure.name}.log").open("ab" if figure.goes_on else "wb") as log:
        process = subprocess.Popen(
            _command(figure, out, workers),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **seen},
        )
        try:
            returncode: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            _end(process)
    status = STOPPED if returncode is None else FAILED if returncode else DONE
    seconds, state = round(time.monotonic() - begin, 1), commit(Path(__file__).parent)
    ending = Ending(status, returncode, seconds, _command(figure, out), state)
    with replacing(out / f"{figure.name}.json") as temporary:
        temporary.write_text(_to_json(ending), encoding="utf-8")
    return ending


def shown(figure: Figure, out: Path) -> str:
    """Returns a figure's command as one would type it."""
    return shlex.join(["python", *_command(figure, out)[1:]]).replace(f"python {shlex.join(_COMMAND)}", "kvzip-press")


def _command(figure: Figure, out: Path, workers: int = 1) -> list[str]:
    folder = str(out / figure.name)
    number = ["--workers", str(workers)] if workers > 1 else []
    spread = {_PROCESSES: number, _WORKERS: ["--executor", "processes", *number] if number else []}
    parts = [spread.get(part, [part.replace(_FOLDER, folder)]) for part in figure.command]
    return [sys.executable, *chain.from_iterable(parts)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started: they share a session of their own."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except (ProcessLookupError, PermissionError):  # all have ended
            break
        try:
            process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _to_json(ending: Ending) -> str:
    return json.dumps(asdict(ending), indent=1) + "\n"


if __name__ == "__main__":
    app()
