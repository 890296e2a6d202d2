"""The command ``kvzip-press``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvzip_press.cli import heads
from kvzip_press.cli.inputs import text_of
from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.loading.command_options import ModelOption
from kvzip_press.terminal import one_line, plain, printable

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="KV-cache compression presses whose eviction is real."
)

app.add_typer(heads.app, name="heads")

# For commands that hand their arguments on to a group of their own, so that no other command waits for its imports.
_HANDED_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}

OutputOption = Annotated[Path, typer.Option("--output", help="Directory for the rows and the picture.")]


def main() -> None:
    """Entry point: prints errors of this package and of files as one line without a traceback, and exits with status 1.

    Files are the operating system's: a disk that is full, a folder that may not be written.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        app()
    except (KVzipPressError, OSError, UnicodeError) as error:
        typer.secho(f"error: {one_line(error)}", fg=typer.colors.RED, err=True)
        raise SystemExit(1) from error


class _OneLine(logging.Formatter):
    """Shows a warning as one line, whatever it quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


@app.callback()
def _commands() -> None:
    """Keeps the commands as commands, however many there are."""


@app.command()
def demo(output: OutputOption = Path("outputs/demo"), model: ModelOption = "smollm2") -> None:
    """Answers questions about real contexts from caches compressed by several presses, and prints the table."""
    from kvzip_press.leaderboard.demo import run_demo

    run_demo(output, model_name=model)


@app.command(**_HANDED_ON)
def leaderboard(context: typer.Context) -> None:
    """Runs that compare presses on tasks, and tables, pages and exports of their rows."""
    from kvzip_press.leaderboard.cli import app as commands

    _hand_on(context, commands)


@app.command(**_HANDED_ON)
def gates(context: typer.Context) -> None:
    """Gates of a model's layers, for the press fastkvzip."""
    from kvzip_press.presses.fastkvzip.command import app as commands

    _hand_on(context, commands)


def _hand_on(context: typer.Context, commands: typer.Typer) -> None:
    typer.main.get_command(commands).main(context.args, prog_name=context.command_path, standalone_mode=False)


@app.command()
def ask(
    question: Annotated[list[str], typer.Option("--question", help="May be given several times.")],
    context: Annotated[Path | None, typer.Option("--context", help="A text file to read and compress.")] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="A compressed cache that --save kept, instead of --context.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Where to keep the compressed cache.")] = None,
    model: ModelOption = "smollm2",
    press: Annotated[str, typer.Option("--press", help="Name of a press, see `kvzip-press presses`.")] = "kvzip",
    compression_ratio: Annotated[
        float, typer.Option("--compression-ratio", help="Fraction of pairs removed, in [0, 1).")
    ] = 0.7,
    storage: Annotated[
        str, typer.Option("--storage", help="How kept pairs are stored: model, int8, fp8, k8v4 or int4.")
    ] = "model",
    answer_prefix: Annotated[
        str, typer.Option("--answer-prefix", help="How every answer begins; small models need the help.")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    split_special_tokens: Annotated[
        bool,
        typer.Option(
            "--split-special-tokens/--no-split-special-tokens",
            help="Read control tokens that stand in the file or in a question (<|im_end|>) as ordinary text.",
        ),
    ] = True,
) -> None:
    """Asks questions about a file, and shows the answers of the full and of the compressed cache side by side.

    With --cache a cache that was compressed earlier answers; the file it was made from is not needed.
    """
    from kvzip_press.loading.by_name import load_model
    from kvzip_press.prefilling.whole import prefill
    from kvzip_press.registry import get_press

    if (context is None) == (cache is None):
        raise InvalidArgumentError("expected one of --context FILE and --cache FILE, got both or none")
    if cache is not None:
        if save is not None:
            raise InvalidArgumentError("expected --save with --context, got it with --cache, which is a saved cache")
        _ask_saved(cache, load_model(model), question, answer_prefix, max_new_tokens, split=split_special_tokens)
        return
    assert context is not None
    text, chosen = text_of(context), get_press(press, compression_ratio, storage=storage)
    loaded, tokenizer = load_model(model)
    done = prefill(loaded, tokenizer, text.rstrip(), observers=[chosen], split_special_tokens=split_special_tokens)
    begin = time.perf_counter()
    compressed = done.evict(chosen.score(done))
    seconds = time.perf_counter() - begin
    if save is not None:  # before anything is asked: reading the context again is what costs
        compressed.save(save, press=chosen)
    full = done.evict(get_press("none").score(done))
    stored = "" if storage == "model" else f", {storage}"
    caches = {"full cache": full, f"{press}, {compression_ratio:.0%} removed{stored}": compressed}
    split = split_special_tokens
    _print_answers(loaded, tokenizer, caches, question, answer_prefix, max_new_tokens, split=split)
    _print_figures(caches, f"{done.valid.shape[1]} tokens read in {done.seconds:.1f} s, compressed in {seconds:.1f} s")


@app.command()
def profile(
    model: Annotated[str | None, typer.Option("--model", help="Path or hub id of a model, or smollm2.")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Random weights of llama3.1-8b, qwen2.5-7b, qwen3-8b or gemma3-12b.")
    ] = None,
    context_length: Annotated[
        list[int] | None,
        typer.Option("--context-length", help="Tokens; several times. Default 4096 16384 65536, on a CPU 1024 4096."),
    ] = None,
    press: Annotated[
        list[str] | None,
        typer.Option("--press", help="Several times; none is always there. Default kvzip, kvzip_local, snapkv."),
    ] = None,
    compression_ratio: Annotated[
        list[float] | None, typer.Option("--compression-ratio", help="Fraction removed, in [0, 1); several times.")
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option("--storage", help="How kept pairs are stored: model, int8, fp8, k8v4, int4; several times."),
    ] = None,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Decode steps timed.")] = 32,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default the GPU if any.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also the compiled decode step.")] = False,
    kvpress: Annotated[
        bool | None, typer.Option("--kvpress/--no-kvpress", help="Also kvpress's own runs; default if installed.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Directory for profile.jsonl.")] = Path("outputs/profile"),
) -> None:
    """Measures what compression costs and gains on a model, and says from which context length on it pays."""
    from kvzip_press.leaderboard.profile.run import run_profile

    run_profile(
        output,
        model=model,
        shape=shape,
        device=device,
        dtype=dtype,
        context_lengths=context_length or (),
        presses=press or (),
        compression_ratios=compression_ratio or (0.7,),
        storages=storage or (),
        decode_tokens=decode_tokens,
        compile=compiled,
        kvpress=kvpress,
    )


@app.command()
def presses() -> None:
    """Lists the names of the presses."""
    from kvzip_press.registry import press_names

    for name in press_names():
        typer.echo(printable(name))


def _print_answers(
    model: Any, tokenizer: Any, caches: dict[str, Any], questions: list[str], prefix: str, limit: int, *, split: bool
) -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Column, Table

    from kvzip_press.decoding.answering import answer

    table = Table("question", *(Column(plain(name)) for name in caches), show_lines=True)
    for question in track(questions, description="answering", transient=True):
        answers = [
            answer(model, tokenizer, cache, question, prefix, limit, split_special_tokens=split)
            for cache in caches.values()
        ]
        table.add_row(*(plain(text, lines=True) for text in (question, *answers)))
    Console().print(table)


def _ask_saved(
    path: Path, model_and_tokenizer: tuple[Any, Any], questions: list[str], prefix: str, limit: int, *, split: bool
) -> None:
    from kvzip_press.cache.file.writing import read_record
    from kvzip_press.cache.ragged_cache import RaggedCache

    model, tokenizer = model_and_tokenizer
    begin = time.perf_counter()
    caches = {path.name: RaggedCache.load(path, model)}
    seconds = time.perf_counter() - begin
    record = read_record(path)
    _print_answers(model, tokenizer, caches, questions, prefix, limit, split=split)
    _print_figures(caches, f"{record.n_seen} tokens, {record.press or 'press not named'}; loaded in {seconds:.1f} s")


def _print_figures(caches: dict[str, Any], note: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("cache", "kept pairs", "resident MB", "times smaller")
    for name, cache in caches.items():
        figures = f"{cache.kept_fraction:.1%}", f"{cache.resident_bytes / 1e6:.1f}", f"{cache.compression:.1f}"
        table.add_row(plain(name), *figures)
    Console().print(table)
    Console().print(plain(note))
