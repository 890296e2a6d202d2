"""What separates the scores of presses, beside the answers: order, ties, smoothness, and what heads get.

``python -m kvzip_press.leaderboard.benchmarks.score_shapes --contexts 8`` compares KVzip's scores with themselves
weighted by surprisal and with those of the gates that the package has for the model. Each figure is a mean over
contexts:

- correlation: Spearman's, with KVzip's scores, over the pairs of a layer (the mean over layers) and over all pairs;
- tied: pairs whose score is within 2 % of the score that decides at this ratio, as a fraction of what is kept;
- neighbours: Pearson's correlation of a pair's score with that of the next token, inside a head;
- in common: pairs that KVzip keeps too, as a fraction of what is kept; heads: correlation of what heads keep with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press import Press, get_press, prefill
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.leaderboard.benchmarks.following import samples_of
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_on
from kvzip_press.terminal import plain

TIED = 0.02
COLUMNS = ("correlation, a layer", "all pairs", "tied", "neighbours", "in common", "heads")


def main(
    contexts: Annotated[int, typer.Option(help="Contexts a task.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 450,
    task: Annotated[list[str] | None, typer.Option(help="Tasks; several times. Default: facts and profiles.")] = None,
    removed: Annotated[float, typer.Option(help="Fraction removed.")] = 0.9,
    gate: Annotated[Path | None, typer.Option(help="A file of gates. Default: the package's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 29,
    by_layer: Annotated[bool, typer.Option(help="Print the gates' correlation in each layer, too.")] = False,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Scores contexts with each press, and prints the figures."""
    loaded, tokenizer = load_on(model, device)
    presses: dict[str, Press] = {
        "kvzip": get_press("kvzip"),
        "kvzip, surprisal": get_press("kvzip", weighting="surprisal"),
        "gated": get_press("fastkvzip", gate=gate),
    }
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in presses}
    layers: list[list[float]] = []
    tasks = [get_task(name) for name in task or ("hidden_facts", "profile_qa")]
    samples = [sample for one in tasks for sample in samples_of(tokenizer, one, contexts, tokens, seed)]
    for sample in track(samples, description="contexts", transient=True):
        done = prefill(loaded, tokenizer, sample.context, observers=list(presses.values()))
        scored = {name: press.score(done).asked_for(removed) for name, press in presses.items()}
        kept = {name: select(scores, done.valid) for name, scores in scored.items()}
        shapes = {name: _free(scores, scored["gated"]) for name, scores in scored.items()}
        for name in presses:
            figures[name].append(_figures(shapes[name], shapes["kvzip"], kept[name], kept["kvzip"]))
        layers.append([rank_correlation(shapes["gated"][i], values) for i, values in shapes["kvzip"].items()])
    table = Table("press", *COLUMNS)
    for name, rows in figures.items():
        table.add_row(name, *(f"{statistics.mean(column):.2f}" for column in zip(*rows, strict=True)))
    Console().print(table)
    if by_layer:
        shown = " ".join(f"{statistics.mean(column):.2f}" for column in zip(*layers, strict=True))
        Console().print(plain(f"gated, by layer: {shown}"))
    Console().print(plain(f"{model}, {len(samples)} contexts of {tokens} tokens, {removed:.0%} removed, seed {seed}"))


def _free(scores: Scores, other: Scores) -> dict[int, torch.Tensor]:
    """Returns the scores ``[heads, n]`` of the tokens that neither protects, which alone compete."""
    free = ~(scores.protected | other.protected)[0]
    return {i: values[0][:, free.to(values.device)] for i, values in scores.layers.items()}


def _figures(
    values: Mapping[int, torch.Tensor],
    reference: Mapping[int, torch.Tensor],
    kept: Mapping[int, torch.Tensor],
    kept_by_reference: Mapping[int, torch.Tensor],
) -> tuple[float, ...]:
    every, expected = (torch.stack(list(one.values())) for one in (values, reference))
    mine, theirs = (torch.stack(list(one.values()))[:, 0] for one in (kept, kept_by_reference))
    n_kept = int(mine.sum())
    decides = float(every.flatten().sort(descending=True).values[min(n_kept, every.numel()) - 1])
    tied = int(((every - decides).abs() <= TIED * abs(decides)).sum()) / n_kept
    per_head = mine.sum(-1).flatten(), theirs.sum(-1).flatten()
    return (
        statistics.mean(rank_correlation(values[i], reference[i]) for i in values),
        rank_correlation(every, expected),
        tied,
        correlation(every[..., :-1], every[..., 1:]),
        int((mine & theirs).sum()) / n_kept,
        correlation(*per_head),
    )


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns Pearson's correlation of two tensors of one shape, over all numbers; over heads centred by themselves.

    Tensors of more than one dimension are centred over their last, so that it is no property of the heads' levels.
    """
    x, y = (each.double() - each.double().mean(-1, keepdim=True) for each in (one, other))
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=1e-30))


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns Spearman's correlation over all numbers; equal ones share their mean rank."""
    return correlation(*(_mean_ranks(each.flatten()) for each in (one, other)))


def _mean_ranks(values: torch.Tensor) -> torch.Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends.double() - (counts.double() - 1) / 2)[group]


if __name__ == "__main__":
    typer.run(main)
