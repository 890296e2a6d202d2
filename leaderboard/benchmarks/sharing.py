"""Layers that read the keys and values of others (KVSharer): how closely the model follows itself, in how many bytes.

``python -m kvzip_press.leaderboard.benchmarks.sharing --contexts 34 --shared 2 --shared 4 --shared 8``

The whole model with its full cache answers the questions; then the model says with shared layers, and with a part of
the pairs that are left removed, what it expects of each token of these answers. Pairs of layers that lie farthest apart
are tried first, as in the paper, or the nearest, which is the control; both under the same least cosine.

Contexts are spread over ``--workers`` processes; the figures are the same for any number. With ``--output`` a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvzip_press import compress, get_press, prefill, share_layers
from kvzip_press.leaderboard.benchmarks.following import COLUMNS, Asked, Comparing, Followed, samples_of
from kvzip_press.leaderboard.benchmarks.parts import Part, parts_of
from kvzip_press.leaderboard.samples.task import Sample, Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_on
from kvzip_press.sharing.search import ORDERS, Order, find_shared_layers
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
    workers: Annotated[int, typer.Option(help="Processes, which share the GPUs.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the comparison and prints it."""
    ratios, numbers = removed or [0.0, 0.7], shared or [1, 2, 4, 8]
    asked = Asking(contexts, tokens, keys, answer_tokens, pieces, min_cosine, press, seed)
    settings = {"benchmark": "sharing", "model": model, **asdict(asked)}
    del settings["contexts"]  # more of them only add
    table = Table("layers that share", "cosine", "removed", *COLUMNS, box=None, pad_edge=False)
    rows: list[dict[str, Any]] = []
    make = functools.partial(Comparison, load_on, model, asked)
    with parts_of(make, device=device, workers=workers, settings=settings, output=output) as parts:
        calls = [Part("search", (n_shared, order)) for n_shared in numbers for order in ORDERS]
        found: dict[str, Any] = {"none": {"cosine": 1.0, "sources": []}}
        for call, of_call in zip(calls, parts.results(calls, "layers that share"), strict=True):
            n_shared, order = call.arguments
            if len(of_call["sources"]) < n_shared:
                table.add_row(f"{n_shared}, {order} first", f"only {len(of_call['sources'])} passed")
            else:
                found[f"{n_shared}, {order} first"] = of_call
        sources = [one["sources"] for one in found.values()]
        of_contexts = parts.results([Part("follow", (n, sources, ratios)) for n in range(contexts)], "contexts")
        for place, (name, of_name) in enumerate(found.items()):
            for at, ratio in enumerate(ratios):
                followed = sum((Followed.of(one["rows"][place][at]) for one in of_contexts), Followed())
                cosine, read = of_name["cosine"], {str(layer): source for layer, source in of_name["sources"]}
                table.add_row(plain(name), f"{cosine:.3f}", f"{ratio:.1f}", *followed.cells())
                row = {"layers": name, "sources": read, "cosine": cosine, "removed": ratio}
                rows.append({**row, **followed.figures()})
        Console().print(table)
        dtype = of_contexts[0]["dtype"]
        said = f"{model} in {dtype}, {press}, {contexts} contexts of {tokens} tokens, {keys} questions each"
        Console().print(plain(f"{said}, seed {seed}; bytes of those of the full cache"))
        if output is not None:
            named = {"model": model, "press": press, "seed": seed}
            made_by = {**named, "contexts": contexts, "tokens": tokens, "keys": keys}
            output.write_text(json.dumps({**made_by, "cells": rows}, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Asking:
    """The contexts of a run, and what is asked of them: see the options of :func:`main`."""

    contexts: int
    tokens: int
    keys: int
    answer_tokens: int
    pieces: int
    min_cosine: float
    press: str
    seed: int


class Comparison(Comparing):
    """What a process does: searches layers that share, and asks the caches of a context."""

    asked: Asking

    @functools.cached_property
    def task(self) -> Task:
        """The task, with as many facts as were asked for."""
        return get_task("hidden_facts", n_keys=self.asked.keys)

    @functools.cached_property
    def samples(self) -> Sequence[Sample]:
        """Its contexts."""
        return samples_of(self.tokenizer, self.task, self.asked.contexts, self.asked.tokens, self.asked.seed)

    def search(self, n_shared: int, order: Order) -> dict[str, Any]:
        """Returns the layers that share with others, as pairs, and the cosine that is left."""
        asked = self.asked
        texts = samples_of(self.tokenizer, self.task, asked.pieces, asked.tokens, asked.seed + 1)
        found = find_shared_layers(
            self.model,
            self.tokenizer,
            [one.context for one in texts],
            n_shared=n_shared,
            order=order,
            n_pieces=asked.pieces,
            min_cosine=asked.min_cosine,
        )
        return {"sources": list(map(list, found.sources.items())), "cosine": found.cosine}

    def follow(
        self, number: int, sources: Sequence[Sequence[tuple[int, int]]], ratios: Sequence[float]
    ) -> dict[str, Any]:
        """Returns the dtype, and what caches of a context followed: for each choice of layers a list by ratio."""
        sample = self.samples[number]
        full = compress(self.model, self.tokenizer, sample.context, get_press("none"))
        asked = Asked.of(self.model, self.tokenizer, full, self.task, sample, self.asked.answer_tokens)
        rows = []
        for of_layers in sources:
            with share_layers(self.model, dict(of_layers)) if of_layers else nullcontext():
                done = prefill(self.model, self.tokenizer, sample.context)
                scores = get_press(self.asked.press, 0.0).score(done)
                caches = [done.evict(scores, ratio) for ratio in ratios]
                rows.append([asdict(asked.follow(self.model, cache)) for cache in caches])
        return {"dtype": self.dtype, "rows": rows}


if __name__ == "__main__":
    typer.run(main)
