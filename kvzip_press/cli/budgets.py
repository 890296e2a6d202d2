"""``kvzip-press budgets``: shares of the budget for a model's heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvzip_press.cli.inputs import text_of
from kvzip_press.cli.outputs import check_file_to_write
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption, load
from kvzip_press.terminal import printable, progress

if TYPE_CHECKING:
    from kvzip_press.heads.share_search import FoundShares

app = typer.Typer(no_args_is_help=True, help='Shares of the budget for a model\'s heads, for the allocation "table".')


@app.callback()
def _group() -> None:
    """Keeps `profile` a command of its own, though it is the only one."""


@app.command()
def profile(
    out: Annotated[Path, typer.Option("--out", help="The JSON file to write.")],
    model: ModelOption,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file; several times. Default: six built-in ones."),
    ] = None,
    press: Annotated[str, typer.Option("--press", help="Scores the first half of each text.")] = "streaming_llm",
    compression_ratio: Annotated[
        float, typer.Option("--compression-ratio", help="Removed of the first half; in [0, 1).")
    ] = 0.85,
    held_out: Annotated[
        int | None, typer.Option("--held-out", min=0, help="Texts not searched on, from the end. Default: a third.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Searches shares of the budget for the model's heads (BaKlaVa-style), and says what they are worth.

    Heads get shares by how much they change what passes through them. Of a grid of such shares, and equal ones, those
    stay under which the second half of each text is the least surprising after a press on the first.
    """
    from rich.console import Console

    from kvzip_press.budget.share_file import write_shares
    from kvzip_press.heads.share_search import find_shares
    from kvzip_press.presses.kvzip_head import builtin_pages
    from kvzip_press.registry import get_press

    made = get_press(press, compression_ratio)
    check_file_to_write(out, text or ())
    texts = {str(path): text_of(path) for path in text} if text else builtin_pages()
    n_held_out = len(texts) // 3 if held_out is None else held_out
    loaded, tokenizer = load(model, device, dtype)
    with progress(Console()) as show:
        show("trying shares")
        found = find_shares(
            loaded,
            tokenizer,
            list(texts.values()),
            made,
            n_held_out=n_held_out,
            progress=lambda done, total: show("trying shares", done, total),
        )
    write_shares(out, found.shares, {"model": model, "press": str(made), "texts": list(texts), **_said(found)})
    typer.echo(printable(f"{out}: {found.shares.shape[0]} layers of {found.shares.shape[1]} heads; {_sentence(found)}"))


def _said(found: FoundShares) -> dict[str, Any]:
    settings = None if found.settings is None else list(found.settings)
    return {
        "settings": settings,
        "perplexity": found.perplexity,
        "equal_perplexity": found.equal_perplexity,
        "held_out": found.held_out,
        "equal_held_out": found.equal_held_out,
    }


def _sentence(found: FoundShares) -> str:
    """Returns what was found, with the perplexity beside that of equal shares."""
    if found.settings is None:
        return f"equal shares, since none was better (perplexity {found.equal_perplexity:.2f})"
    exponent, least, most = found.settings
    sides = [f"perplexity {found.perplexity:.2f}, with equal shares {found.equal_perplexity:.2f}"]
    if found.held_out is not None and found.equal_held_out is not None:
        better = "better" if found.held_out < found.equal_held_out else "no better"
        sides.append(f"held out {found.held_out:.2f} and {found.equal_held_out:.2f}, so {better} there")
    return f"importance ** {exponent:g} within {least:g} to {most:g} times the mean; {'; '.join(sides)}"
