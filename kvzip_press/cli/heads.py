"""``kvzip-press heads``: computes, exports and imports scores of a model's heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvzip_press.cli.inputs import regular, text_of
from kvzip_press.cli.outputs import check_file_to_write
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption, load
from kvzip_press.terminal import printable, progress

app = typer.Typer(
    no_args_is_help=True, help="Scores of a model's KV heads, for the presses kvzip_head and duo_attention."
)

OutOption = Annotated[Path, typer.Option("--out", help="The safetensors file to write.")]
FORMATS = ("duo-attention",)
METHODS = ("kvzip", "duo-attention")


@app.command()
def compute(
    out: OutOption,
    model: ModelOption,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file; several times. Default: eight built-in ones."),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="kvzip, or duo-attention (kvpress's short cut).")] = "kvzip",
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Of kvzip: tokens replayed at a time.")] = 2048,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Scores every KV head of a model once: runs KVzip over each text and takes the best pairs of each head.

    The longer the texts, and the closer to what the model will read, the better: KVzip used 88 thousand tokens of a
    book.
    """
    if method not in METHODS:
        raise InvalidArgumentError(f"expected --method to be one of {METHODS}, got {method!r}")
    check_file_to_write(out, text or ())
    texts = _texts(text)
    loaded, tokenizer = load(model, device, dtype)
    scores = _compute(method, chunk_size, loaded, tokenizer, list(texts.values()))
    scores.save(out)
    n_ones = int((scores.values >= 1).sum())
    typer.echo(
        printable(f"{out}: {scores.values.shape[0]} layers of {scores.values.shape[1]} heads from {', '.join(texts)}")
        + "; scores "
        f"{scores.values.min():.3f} to {scores.values.max():.3f}, mean {scores.values.mean():.3f}, {n_ones} at 1"
    )


@app.command()
def export(
    scores: Annotated[
        Path,
        typer.Option("--scores", help="A file of `heads compute`, or a .pt of KVzip's."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    layout: Annotated[str, typer.Option("--format", help="duo-attention.")] = "duo-attention",
    sink_size: Annotated[int, typer.Option("--sink-size", min=0, help="First tokens of a streaming head.")] = 128,
    recent_size: Annotated[int, typer.Option("--recent-size", min=0, help="Last tokens of a streaming head.")] = 256,
) -> None:
    """Writes scores in another project's format: a DuoAttention pattern, whose sparsity is our compression ratio."""
    from kvzip_press.heads.scores import HeadScores
    from kvzip_press.presses.duo_attention import export_duo

    if layout not in FORMATS:
        raise InvalidArgumentError(f"expected --format to be one of {FORMATS}, got {layout!r}")
    export_duo(HeadScores.load(regular(scores)), out, sink_size, recent_size)
    typer.echo(printable(f"{out}: a DuoAttention pattern, sink_size={sink_size}, recent_size={recent_size}"))


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Option("--folder", help="A DuoAttention pattern.")],
    out: OutOption,
) -> None:
    """Reads a DuoAttention pattern as scores of heads, and says which sink and window it was made for."""
    from kvzip_press.presses.duo_attention import import_duo

    scores, sink_size, recent_size = import_duo(folder)
    scores.save(out)
    typer.echo(printable(f"{out}: {scores!r}; made for n_sink={sink_size}, window_size={recent_size}"))


def _texts(paths: Sequence[Path] | None) -> dict[str, str]:
    from kvzip_press.presses.kvzip_head import builtin_texts

    if not paths:
        return builtin_texts()
    return {str(path): text_of(path) for path in paths}


def _compute(method: str, chunk_size: int, model: Any, tokenizer: Any, texts: list[str]) -> Any:
    from rich.console import Console

    from kvzip_press.presses import duo_attention, kvzip_head

    with progress(Console()) as show:
        show("scoring heads")

        def on_progress(done: int, total: int) -> None:
            show("scoring heads", done, total)

        if method == "duo-attention":
            return duo_attention.compute_head_scores(model, tokenizer, texts, progress=on_progress)
        return kvzip_head.compute_head_scores(model, tokenizer, texts, chunk_size=chunk_size, progress=on_progress)
