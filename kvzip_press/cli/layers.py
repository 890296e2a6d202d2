"""``kvzip-press layers``: layers that read the keys and values of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvzip_press.cli.inputs import text_of
from kvzip_press.cli.outputs import check_file_to_write
from kvzip_press.loading.command_options import DeviceOption, DtypeOption, ModelOption, load
from kvzip_press.terminal import printable, progress

app = typer.Typer(no_args_is_help=True, help="Layers that read the keys and values of others (KVSharer).")


@app.callback()
def _group() -> None:
    """Keeps `share` a command of its own, though it is the only one."""


@app.command()
def share(
    out: Annotated[Path, typer.Option("--out", help="The JSON file to write, for share_layers(model, file).")],
    model: ModelOption,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file; several times. Default: six built-in ones."),
    ] = None,
    n_shared: Annotated[int, typer.Option("--n-shared", min=1, help="How many layers shall read others.")] = 4,
    min_cosine: Annotated[
        float, typer.Option("--min-cosine", help="Least cosine of last hidden states with shared layers and without.")
    ] = 0.5,
    order: Annotated[
        str, typer.Option("--order", help="Pairs of layers to try first: dissimilar (the paper's) or similar.")
    ] = "dissimilar",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Searches layers that can read the keys and values of earlier ones (KVSharer), and says what that changes.

    Such a layer takes no memory in a cache, and its keys and values are not computed.
    """
    from rich.console import Console

    from kvzip_press.errors import InvalidArgumentError
    from kvzip_press.model.identity import facts_of
    from kvzip_press.model.structure import attention_layers
    from kvzip_press.presses.kvzip_head import builtin_pages
    from kvzip_press.sharing.file import write_sources
    from kvzip_press.sharing.search import checked_order, find_shared_layers

    tried_first = checked_order(order)
    check_file_to_write(out, text or ())
    texts = {str(path): text_of(path) for path in text} if text else builtin_pages()
    loaded, tokenizer = load(model, device, dtype)
    with progress(Console()) as show:
        show("trying pairs of layers")
        found = find_shared_layers(
            loaded,
            tokenizer,
            list(texts.values()),
            n_shared=n_shared,
            min_cosine=min_cosine,
            order=tried_first,
            progress=lambda done, total: show("trying pairs of layers", done, total),
        )
    if not found.sources:
        raise InvalidArgumentError(
            f"expected a pair of layers with a cosine above {min_cosine:g}, got none of {found.n_tried}: nothing is "
            "written"
        )
    settings = {"order": order, "min_cosine": min_cosine, "cosine": found.cosine, "n_tried": found.n_tried}
    write_sources(out, found.sources, facts_of(loaded), {"name": model, "texts": list(texts), **settings})
    pairs = ", ".join(f"{layer} reads {source}" for layer, source in sorted(found.sources.items()))
    typer.echo(
        printable(
            f"{out}: {len(found.sources)} of {len(attention_layers(loaded))} layers share ({pairs}); {found.n_tried} "
            f"pairs tried; cosine of last hidden states {found.cosine:.3f}"
        )
    )
