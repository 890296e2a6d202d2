"""``kvzip-press queries``: what is known of a model's queries beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvzip_press.cli.inputs import text_of
from kvzip_press.cli.outputs import check_file_to_write
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption, load
from kvzip_press.terminal import printable, progress

FEW_TOKENS = 1000  # with fewer, a mean is rather that of these tokens

app = typer.Typer(no_args_is_help=True, help="Means of a model's queries, for the press triattention.")


@app.callback()
def _group() -> None:
    """Keeps `calibrate` a command of its own, though it is the only one."""


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.")],
    model: ModelOption,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file; several times. Default: six built-in ones."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Reads each text once and writes the means of the model's queries before RoPE.

    A few thousand tokens of what the model usually writes are enough. RoPE has to have fixed frequencies.
    """
    from rich.console import Console

    from kvzip_press.presses.decoding.triattention import calibrate_queries
    from kvzip_press.presses.kvzip_head import builtin_pages

    check_file_to_write(out, text or ())
    texts = {str(path): text_of(path) for path in text} if text else builtin_pages()
    loaded, tokenizer = load(model, device, dtype)
    with progress(Console()) as show:
        show("reading")
        found = calibrate_queries(
            loaded, tokenizer, list(texts.values()), progress=lambda done, total: show("reading", done, total)
        )
    found.save(out)
    concentration = (found.centres.norm(dim=-1) / found.magnitudes).mean()
    n_tokens = sum(one["tokens"] for one in json.loads(found.provenance["texts"]))
    few = "" if n_tokens >= FEW_TOKENS else f". These are few: {FEW_TOKENS} of what the model usually writes say more"
    typer.echo(
        printable(f"{out}: {found!r} from {', '.join(texts)}")
        + f", {n_tokens} tokens; the mean query is {concentration:.0%} as long as queries are on average{few}"
    )
