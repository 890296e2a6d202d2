"""The command ``kvzip-press``."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from kvzip_press.cli import budgets, heads, layers, queries
from kvzip_press.cli.inputs import text_of
from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption
from kvzip_press.terminal import one_line, plain, printable
from kvzip_press.version import __version__


class _Commands(typer.core.TyperGroup):
    """Commands whose usage errors show what they quote, an argument of any characters, as text."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parses the options before the command."""
        with _arguments_quoted():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """Parses what follows, and runs the command."""
        with _arguments_quoted():
            return super().invoke(*args, **kwargs)


@contextmanager
def _arguments_quoted() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # click's class, or typer's own copy of it: which one depends on typer's version
        if hasattr(error, "format_message") and hasattr(error, "message") and error.message:
            error.message = printable(error.message)
        raise


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    help="KV-cache compression presses whose eviction is real.",
)

app.add_typer(budgets.app, name="budgets")
app.add_typer(layers.app, name="layers")
app.add_typer(heads.app, name="heads")
app.add_typer(queries.app, name="queries")

# For commands that hand their arguments on to a group of their own, so that no other command waits for its imports.
_HANDED_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}

LINE = 240  # characters of a line that a file or another command reads: none is broken

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


def _on_version(asked: bool) -> None:
    if not asked:
        return
    beside = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "kvpress", "triton"):  # by their metadata: importing them takes seconds
        with suppress(importlib.metadata.PackageNotFoundError):
            beside.append(f"{name} {importlib.metadata.version(name)}")
    typer.echo(f"kvzip-press {__version__} ({', '.join(beside)})")
    raise typer.Exit


@app.callback()
def _commands(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the versions and end.", is_eager=True, callback=_on_version)
    ] = False,
) -> None:
    """Keeps the commands as commands, however many there are."""


@app.command()
def demo(output: OutputOption = Path("outputs/demo"), model: ModelOption = "smollm2") -> None:
    """Answers questions about nine short contexts from caches compressed by several presses, and prints the table."""
    from kvzip_press.leaderboard.demo import run_demo

    run_demo(output, model_name=model)


@app.command(**_HANDED_ON)
def leaderboard(context: typer.Context) -> None:
    """Runs that compare presses on tasks, and tables, pages and exports of their rows."""
    from kvzip_press.leaderboard.cli import app as commands

    _hand_on(context, commands)


@app.command(**_HANDED_ON)
def gates(context: typer.Context) -> None:
    """Gates of a model's layers, for the presses fastkvzip and trimkv."""
    from kvzip_press.cli.gates import app as commands

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
    press: Annotated[
        str | None, typer.Option("--press", help="Name of a press, see `kvzip-press presses`; default kvzip.")
    ] = None,
    compression_ratio: Annotated[
        float | None,
        typer.Option("--compression-ratio", help="Fraction of pairs removed, in [0, 1); default 0.7."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="How kept pairs are stored: model (default), int8, fp8, k8v4, int4, kivi4, kivi2 or tiers.",
        ),
    ] = None,
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

    With --cache a cache that was compressed earlier answers; the file it was made from is not needed. On a terminal the
    answers appear as they are written.
    """
    from kvzip_press.cli.asking import Asking
    from kvzip_press.files import check_writable
    from kvzip_press.loading.by_name import load_model
    from kvzip_press.registry import get_press

    if (context is None) == (cache is None):
        raise InvalidArgumentError("expected one of --context FILE and --cache FILE, got both or none")
    about_context = {
        "--save": save,
        "--press": press,
        "--compression-ratio": compression_ratio,
        "--storage": storage,
    }
    given = [name for name, value in about_context.items() if value is not None]
    if cache is not None and given:
        raise InvalidArgumentError(
            f"expected {', '.join(given)} with --context, got it with --cache, which is a saved cache: what that keeps "
            "is decided"
        )
    name, ratio = press or "kvzip", 0.7 if compression_ratio is None else compression_ratio
    chosen = get_press(name, ratio, storage=storage or "model")
    text = None if context is None else text_of(context)
    if save is not None:
        check_writable(save, "--save")
    asking = Asking(*load_model(model), question, answer_prefix, max_new_tokens, split_special_tokens)
    if text is None:
        assert cache is not None
        asking.of_saved(cache)
    else:
        label = f"{name}, {ratio:.0%} removed{f', {storage}' if storage else ''}"
        asking.of_text(text, chosen, label, save)


@app.command()
def profile(
    model: Annotated[str | None, typer.Option("--model", help="Path or hub id of a model, or smollm2.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", help="Random weights of qwen2.5-0.5b, llama3.1-8b, qwen2.5-7b, qwen3-8b or gemma3-12b."
        ),
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
        list[float] | None,
        typer.Option("--compression-ratio", help="Fraction removed, in [0, 1); several times. Default 0.7."),
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(
            "--storage",
            help="How kept pairs are stored: model (default), int8, fp8, k8v4, int4, kivi4, kivi2, tiers; several "
            "times.",
        ),
    ] = None,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Decode steps timed.")] = 32,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default the GPU if any.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; default the model's.")] = None,
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
def compress(
    text: Annotated[list[Path], typer.Option("--text", help="A text file to read; may be given several times.")],
    name: Annotated[
        str | None, typer.Option("--name", help="What the context is asked for by; default the file's name.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The folder of contexts.")] = Path("contexts"),
    model: ModelOption = "smollm2",
    press: Annotated[str, typer.Option("--press", help="Name of a press, see `kvzip-press presses`.")] = "kvzip",
    compression_ratio: Annotated[
        float, typer.Option("--compression-ratio", help="Fraction of pairs removed, in [0, 1).")
    ] = 0.7,
    storage: Annotated[
        str,
        typer.Option("--storage", help="How kept pairs are stored: model, int8, fp8, k8v4, int4, kivi4, kivi2, tiers."),
    ] = "model",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    split_special_tokens: Annotated[
        bool,
        typer.Option(
            "--split-special-tokens/--no-split-special-tokens",
            help="Read control tokens that stand in a text (<|im_end|>) as ordinary text.",
        ),
    ] = True,
) -> None:
    """Compresses texts into a folder of contexts, from which `kvzip-press serve` and a session answer."""
    from kvzip_press.cli.compressing import Compressing, texts_of
    from kvzip_press.files import check_writable
    from kvzip_press.loading.command_options import load
    from kvzip_press.registry import get_press

    texts, chosen = texts_of(text, name), get_press(press, compression_ratio, storage=storage)
    check_writable(out / "context", "a context in --out", parents=True)
    Compressing(*load(model, device, dtype), chosen, out, split_special_tokens).run(texts)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    contexts: Annotated[Path, typer.Option("--contexts", help="A folder of compressed caches, <name>.safetensors.")],
    model: ModelOption = "smollm2",
    pool_gb: Annotated[float, typer.Option("--pool-gb", help="Memory for contexts on each GPU, in 1e9 bytes.")] = 4.0,
    storage: Annotated[
        str, typer.Option("--storage", help="How the pool holds pairs: model, or int8 for contexts stored so.")
    ] = "model",
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", min=1, help="GPUs that share the model and its contexts.")
    ] = 1,
) -> None:
    """Serves questions about compressed contexts over HTTP, by vLLM; further options are those of its server."""
    from kvzip_press.serving.vllm.server import serve as run

    pool: dict[str, Any] = {
        "pool_bytes": int(pool_gb * 1e9),
        "n_ranks": tensor_parallel_size,
        "storage": storage,
    }
    status = run(model, contexts, **pool, options=context.args)
    raise typer.Exit(status)


@app.command()
def presses() -> None:
    """Lists the presses: what each keeps, the paper, and what it needs."""
    from rich.console import Console
    from rich.table import Table

    from kvzip_press.registry import presses_table

    table = Table("press", "what it keeps", "arXiv", "needs", box=None, pad_edge=False)
    for info in presses_table():
        needs = ", ".join(filter(None, ("kvpress" if info.needs_kvpress else "", info.needs)))
        table.add_row(*map(plain, (info.name, info.summary, info.paper, needs)))
    Console(width=None if Console().is_terminal else LINE).print(table)
