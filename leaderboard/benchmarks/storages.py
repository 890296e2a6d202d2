"""Compares storages at several fractions removed: how closely the cache follows the full one, and in how many bytes.

``python -m kvzip_press.leaderboard.benchmarks.storages --contexts 12 --tokens 450``

The full cache writes an answer to each question; then every cache says what it expects of each token of these answers.
"Lost by storage" compares with the same pairs in the model's dtype, "lost in all" with the full cache.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press import generate, get_press, load_model, prefill, question_ids
from kvzip_press.cache.codecs.by_name import STORAGES
from kvzip_press.leaderboard.benchmarks.following import samples_of
from kvzip_press.leaderboard.running.agreement import Agreement, log_probabilities
from kvzip_press.leaderboard.samples.task import Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.terminal import plain

REMOVED = [0.0, 0.5, 0.7, 0.9]
NOTHING = Agreement((), ())


def main(
    contexts: Annotated[int, typer.Option(help="Contexts.")] = 12,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 450,
    keys: Annotated[int, typer.Option(help="Facts, and questions, a context.")] = 6,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer that the full cache writes.")] = 12,
    removed: Annotated[list[float], typer.Option(help="Fractions removed.")] = REMOVED,
    storage: Annotated[list[str] | None, typer.Option(help="Storages; all by default.")] = None,
    press: Annotated[str, typer.Option(help="The press that scores.")] = "kvzip",
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 29,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the comparison and prints it."""
    loaded, tokenizer = load_model(model)
    task: Task = get_task("hidden_facts", n_keys=keys)
    samples = samples_of(tokenizer, task, contexts, tokens, seed)
    alone: dict[tuple[float, str], Agreement] = {}
    in_all: dict[tuple[float, str], Agreement] = {}
    smaller: dict[tuple[float, str], list[float]] = {}
    for sample in track(samples, description="contexts", transient=True):
        done = prefill(loaded, tokenizer, sample.context)
        scores = get_press(press, 0.0).score(done)
        asked = [list(question_ids(tokenizer, q.text, answer_prefix=q.answer_prefix)) for q in sample.questions]
        full = done.evict(scores, 0.0, storage="model")
        written = [generate(loaded, full.fork(), [ids], answer_tokens)[0] for ids in asked]
        expected = log_probabilities(loaded, full, asked, written)
        for ratio in removed:
            exact = log_probabilities(loaded, done.evict(scores, ratio, storage="model"), asked, written)
            for name in storage or STORAGES:
                cache = done.evict(scores, ratio, storage=name)
                found = exact if name == "model" else log_probabilities(loaded, cache, asked, written)
                cell = ratio, name
                alone[cell] = alone.get(cell, NOTHING) + Agreement.of(exact, found)
                in_all[cell] = in_all.get(cell, NOTHING) + Agreement.of(expected, found)
                smaller.setdefault(cell, []).append(cache.compression)
    rows: list[dict[str, Any]] = [
        {
            "removed": ratio,
            "storage": name,
            "times_smaller": statistics.mean(smaller[ratio, name]),
            "tokens": len(alone[ratio, name].kl),
            **_figures("by_storage", alone[ratio, name]),
            **_figures("in_all", in_all[ratio, name]),
        }
        for ratio, name in alone
    ]
    dtype = str(loaded.dtype).removeprefix("torch.")
    if output is not None:
        made_by = {"model": model, "dtype": dtype, "press": press, "seed": seed, "contexts": contexts, "tokens": tokens}
        output.write_text(json.dumps({**made_by, "cells": rows}, indent=1) + "\n", encoding="utf-8")
    Console().print(_table(rows))
    Console().print(
        plain(f"{model} in {dtype}, {press}, {contexts} contexts of {tokens} tokens, seed {seed}; KL in nats")
    )


def _figures(prefix: str, found: Agreement) -> dict[str, float]:
    spread = statistics.stdev(found.kl) / math.sqrt(len(found.kl))
    return {f"kl_{prefix}": found.mean_kl, f"kl_{prefix}_se": spread, f"same_{prefix}": found.share}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    names = ("removed", "storage", "smaller", "KL by storage", "same", "KL in all", "same")
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        cells: list[Any] = [f"{row['removed']:.1f}", plain(str(row["storage"])), f"{row['times_smaller']:.1f}"]
        for part in ("by_storage", "in_all"):
            cells += [f"{row['kl_' + part]:z.4f} ± {row[f'kl_{part}_se']:.4f}", f"{row['same_' + part]:.3f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    typer.run(main)
