"""Layers that read the keys and values of others (KVSharer): how closely the model follows itself, in how many bytes.

``python -m kvzip_press.leaderboard.benchmarks.sharing --contexts 34 --shared 2 --shared 4 --shared 8``

The whole model with its full cache answers the questions; then the model says with shared layers, and with a part of
the pairs that are left removed, what it expects of each token of these answers. Pairs of layers that lie farthest apart
are tried first, as in the paper, or the nearest, which is the control; both under the same least cosine.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press import compress, get_press, load_model, prefill, share_layers
from kvzip_press.leaderboard.benchmarks.following import COLUMNS, Asked, Followed, samples_of
from kvzip_press.leaderboard.samples.task import Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.model.devices import get_device
from kvzip_press.sharing.search import ORDERS, find_shared_layers
from kvzip_press.terminal import plain


def main(
    contexts: Annotated[int, typer.Option(help="Contexts.")] = 34,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 450,
    keys: Annotated[int, typer.Option(help="Facts, and questions, a context.")] = 6,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer that the full cache writes.")] = 12,
    shared: Annotated[list[int] | None, typer.Option(help="Numbers of shared layers; default 1, 2, 4, 8.")] = None,
    removed: Annotated[list[float] | None, typer.Option(help="Fractions of pairs removed; default 0, 0.7.")] = None,
    pieces: Annotated[int, typer.Option(help="Pieces of text, of 64 tokens, that the search reads.")] = 30,
    min_cosine: Annotated[float, typer.Option(help="Least cosine of a pair of layers that is taken.")] = 0.5,
    press: Annotated[str, typer.Option(help="The press that scores.")] = "kvzip",
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 29,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the comparison and prints it."""
    loaded, tokenizer = load_model(model)
    loaded.to(get_device(device))  # type: ignore[arg-type]  # transformers types this for its own parallel models
    task: Task = get_task("hidden_facts", n_keys=keys)
    samples = samples_of(tokenizer, task, contexts, tokens, seed)
    asked = [
        Asked.of(
            loaded,
            tokenizer,
            compress(loaded, tokenizer, sample.context, get_press("none")),
            task,
            sample,
            answer_tokens,
        )
        for sample in track(samples, description="full cache", transient=True)
    ]
    table = Table("layers that share", "cosine", "removed", *COLUMNS, box=None, pad_edge=False)
    rows: list[dict[str, Any]] = []

    def add(name: str, cosine: float, sources: dict[int, int]) -> None:
        followed = dict.fromkeys(removed or [0.0, 0.7], Followed())
        for sample, one in zip(samples, asked, strict=True):
            done = prefill(loaded, tokenizer, sample.context)
            scores = get_press(press, 0.0).score(done)
            for ratio in followed:
                followed[ratio] += one.follow(loaded, done.evict(scores, ratio))
        for ratio, found in followed.items():
            table.add_row(plain(name), f"{cosine:.3f}", f"{ratio:.1f}", *found.cells())
            read = {str(layer): source for layer, source in sources.items()}
            rows.append({"layers": name, "sources": read, "cosine": cosine, "removed": ratio, **found.figures()})

    add("none", 1.0, {})
    texts = [one.context for one in samples_of(tokenizer, task, pieces, tokens, seed + 1)]
    for n_shared in shared or [1, 2, 4, 8]:
        for order in ORDERS:
            options: dict[str, Any] = {"n_pieces": pieces, "min_cosine": min_cosine}
            found = find_shared_layers(loaded, tokenizer, texts, n_shared=n_shared, order=order, **options)
            if len(found.sources) < n_shared:
                table.add_row(f"{n_shared}, {order} first", f"only {len(found.sources)} passed")
                continue
            with share_layers(loaded, found.sources):
                add(f"{n_shared}, {order} first", found.cosine, found.sources)
    Console().print(table)
    said = f"{model} in {str(loaded.dtype).removeprefix('torch.')}, {press}, {contexts} contexts of {tokens} tokens"
    Console().print(plain(f"{said}, {keys} questions each, seed {seed}; bytes of those of the full cache"))
    if output is not None:
        made_by = {"model": model, "press": press, "seed": seed, "contexts": contexts, "tokens": tokens, "keys": keys}
        output.write_text(json.dumps({**made_by, "cells": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
