"""``kvzip-press heads``: scores of a model's heads, made, exported and imported."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption, load

app = typer.Typer(
    no_args_is_help=True, help="Scores of a model's KV heads, for the presses kvzip_head and duo_attention."
)

OutOption = Annotated[Path, typer.Option("--out", help="The safetensors file to write.")]
FORMATS = ("duo-attention",)
METHODS = {"kvzip": "kvzip_head", "duo-attention": "duo_attention"}
"""Method -> the press that its scores are for."""


@app.command()
def compute(
    out: OutOption,
    model: ModelOption,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", exists=True, dir_okay=False, help="A text file; several times. Default: eight built-in ones."
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="kvzip, or duo-attention (kvpress's short cut).")] = "kvzip",
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Of kvzip: tokens replayed at a time.")] = 2048,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Scores every KV head of a model once: KVzip over each text, the best pairs of each head.

    The longer the texts, and the more like what the model will read, the better: KVzip took 88 thousand tokens of a
    book.
    """
    if method not in METHODS:
        raise InvalidArgumentError(f"expected --method to be one of {tuple(METHODS)}, got {method!r}")
    texts = _texts(text)
    loaded, tokenizer = load(model, device, dtype)
    options = {"chunk_size": chunk_size} if method == "kvzip" else {}
    scores = _compute(METHODS[method], loaded, tokenizer, list(texts.values()), **options)
    scores.save(out)
    n_ones = int((scores.values >= 1).sum())
    typer.echo(
        f"{out}: {scores.values.shape[0]} layers of {scores.values.shape[1]} heads from {', '.join(texts)}; scores "
        f"{scores.values.min():.3f} to {scores.values.max():.3f}, mean {scores.values.mean():.3f}, {n_ones} at 1"
    )


@app.command()
def export(
    scores: Annotated[
        Path,
        typer.Option("--scores", help="A file of `heads compute`, or a .pt of KVzip's.", exists=True, dir_okay=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    layout: Annotated[str, typer.Option("--format", help="duo-attention.")] = "duo-attention",
    sink_size: Annotated[int, typer.Option("--sink-size", min=0, help="First tokens of a streaming head.")] = 128,
    recent_size: Annotated[int, typer.Option("--recent-size", min=0, help="Last tokens of a streaming head.")] = 256,
) -> None:
    """Writes scores in another project's format: a DuoAttention pattern, whose sparsity is our compression ratio."""
    from kvzip_press.heads.scores import HeadScores

    if layout not in FORMATS:
        raise InvalidArgumentError(f"expected --format to be one of {FORMATS}, got {layout!r}")
    _press("duo_attention").export_duo(HeadScores.load(scores), out, sink_size, recent_size)
    typer.echo(f"{out}: a DuoAttention pattern, sink_size={sink_size}, recent_size={recent_size}")


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Option("--folder", help="A DuoAttention pattern.", exists=True, file_okay=False)],
    out: OutOption,
) -> None:
    """Reads a DuoAttention pattern as scores of heads, and says which sink and window it was made for."""
    scores, sink_size, recent_size = _press("duo_attention").import_duo(folder)
    scores.save(out)
    typer.echo(f"{out}: {scores!r}; made for n_sink={sink_size}, window_size={recent_size}")


def _texts(paths: Sequence[Path] | None) -> dict[str, str]:
    if not paths:
        texts: dict[str, str] = _press("kvzip_head").builtin_texts()
        return texts
    return {str(path): path.read_text(encoding="utf-8") for path in paths}


def _compute(press: str, model: Any, tokenizer: Any, texts: list[str], **options: int) -> Any:
    from rich.progress import Progress

    with Progress(transient=True) as shown:
        bar = shown.add_task("scoring heads", total=None)
        return _press(press).compute_head_scores(
            model,
            tokenizer,
            texts,
            progress=lambda done, total: shown.update(bar, completed=done, total=total),
            **options,
        )


def _press(name: str) -> Any:
    """What a press comes with, found by its name: the core knows no press."""
    from kvzip_press.presses import PRESSES

    return importlib.import_module(PRESSES[name].partition(":")[0])
