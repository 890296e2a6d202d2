"""All allocations of a budget under several scorers, at equal bytes: how closely each follows the full cache.

``python -m kvzip_press.leaderboard.benchmarks.allocations --task hidden_facts --scorer kvzip --contexts 34``

Each context is read once, and scored once by each scorer. "table" has shares that are searched on other contexts of the
task (BaKlaVa-style). "tolerance" and "threshold" take no ratio: they get the tolerance, or the threshold, under which
other contexts of the task keep as much as the ratio says, and what they then keep of each context is in the table, from
the least to the most. ``--tolerance`` adds fixed tolerances (ReFreeKV's own is 0.05).

The last two columns are what an engine with pages of 16 or of 64 pairs a head would hold, as a fraction of all pairs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table as Shown

from kvzip_press import Prefill, RaggedCache, Scores, get_press, load_model, prefill
from kvzip_press.budget.allocators import Allocation, Pages, Table, Threshold, Tolerance, allocation_of
from kvzip_press.budget.selection import select
from kvzip_press.heads.share_search import find_shares
from kvzip_press.leaderboard.benchmarks.following import COLUMNS, Asked, Followed, samples_of
from kvzip_press.leaderboard.samples.task import Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.model.devices import get_device
from kvzip_press.terminal import plain

NAMED = ("global", "layer", "head", "adakv", "pyramid")
TASKS: dict[str, dict[str, Any]] = {  # with several questions a context
    "hidden_facts": {"n_keys": 6},
    "profile_qa": {"n_people": 1, "n_attributes": 8},
}
PAGE_SIZES = (16, 64)


@dataclass(frozen=True)
class Cell:
    """One row of the table: an allocation with its amount."""

    label: str
    removed: float
    allocation: Allocation


def main(
    contexts: Annotated[int, typer.Option(help="Contexts of each task.")] = 34,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 450,
    task: Annotated[list[str] | None, typer.Option(help="Tasks; default hidden_facts and profile_qa.")] = None,
    scorer: Annotated[list[str] | None, typer.Option(help="Presses; kvzip, snapkv, expected_attention.")] = None,
    removed: Annotated[list[float] | None, typer.Option(help="Fractions removed; default 0.7, 0.9.")] = None,
    tolerance: Annotated[list[float] | None, typer.Option(help="Fixed tolerances; default 0.01, 0.05.")] = None,
    others: Annotated[int, typer.Option(help="Other contexts, for shares, tolerances and thresholds.")] = 6,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer that the full cache writes.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 29,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the comparison and prints a table for each task."""
    loaded, tokenizer = load_model(model)
    loaded.to(get_device(device))  # type: ignore[arg-type]  # transformers types this for its own parallel models
    names, ratios = scorer or ["kvzip", "snapkv", "expected_attention"], removed or [0.7, 0.9]
    rows: list[dict[str, Any]] = []
    for task_name in task or list(TASKS):
        asked_task: Task = get_task(task_name, **TASKS.get(task_name, {}))
        other = [one.context for one in samples_of(tokenizer, asked_task, others, tokens, seed + 1)]
        cells = {
            name: [*_cells(loaded, tokenizer, name, other, ratios), *_fixed(tolerance or [0.01, 0.05])]
            for name in track(names, description=f"{task_name}: tables and tolerances", transient=True)
        }
        found: dict[tuple[str, str, float], tuple[Followed, list[list[float]]]] = {}
        samples = samples_of(tokenizer, asked_task, contexts, tokens, seed)
        for sample in track(samples, description=task_name, transient=True):
            done = prefill(loaded, tokenizer, sample.context, observers=[get_press(name, 0.0) for name in names])
            full = done.evict(get_press("none").score(done))
            asked = Asked.of(loaded, tokenizer, full, asked_task, sample, answer_tokens)
            _add(found, ("full cache", "", 0.0), asked.follow(loaded, full), full)
            for name in names:
                scores = get_press(name, 0.0).score(done)
                for cell in cells[name]:
                    cache = done.evict(scores, cell.removed, cell.allocation)
                    _add(found, (name, cell.label, cell.removed), asked.follow(loaded, cache), cache)
        made = {(name, cell.label, cell.removed): repr(cell.allocation) for name in names for cell in cells[name]}
        rows += [
            {"task": task_name, "scorer": name, "allocation": label, "removed": ratio}
            | {"made": made.get((name, label, ratio), "")}
            | followed.figures()
            | {
                f"in_pages_of_{size}": _mean(part)
                for size, part in zip(PAGE_SIZES, zip(*pages, strict=True), strict=True)
            }
            for (name, label, ratio), (followed, pages) in found.items()
        ]
        Console().print(_shown(task_name, found))
    dtype = str(loaded.dtype).removeprefix("torch.")
    Console().print(plain(f"{model} in {dtype}, {contexts} contexts of {tokens} tokens a task, seed {seed}"))
    if output is not None:
        made_by = {"model": model, "dtype": dtype, "seed": seed, "contexts": contexts, "tokens": tokens}
        output.write_text(json.dumps({**made_by, "cells": rows}, indent=1) + "\n", encoding="utf-8")


def _fixed(tolerances: Sequence[float]) -> Iterator[Cell]:
    for one in tolerances:
        for per in ("head", "layer"):
            yield Cell(f"tolerance {one:g} a {per}", 0.0, Tolerance(tolerance=one, per=per))


def _cells(model: Any, tokenizer: Any, name: str, texts: Sequence[str], ratios: Sequence[float]) -> Iterator[Cell]:
    """Yields the allocations of a scorer at each ratio, made on other texts where they have to be."""
    done = [prefill(model, tokenizer, text, observers=[get_press(name, 0.0)]) for text in texts]
    scored = [(one, get_press(name, 0.0).score(one)) for one in done]
    for ratio in ratios:
        yield from (Cell(one, ratio, allocation_of(one)) for one in NAMED)
        yield from (Cell(f"pages of {size}", ratio, Pages(page_size=size)) for size in PAGE_SIZES)
        shares = find_shares(model, tokenizer, texts, get_press(name, ratio, allocation="head")).shares
        yield Cell("table", ratio, Table(shares=shares.tolist()))
        kept = _mean([_kept(one, scores.asked_for(ratio)) for one, scores in scored])
        for label, made in _outcomes(scored).items():
            yield Cell(f"{label}, kept about {1 - ratio:.1f}", 0.0, _that_keeps(kept, scored, made))


def _outcomes(scored: Sequence[tuple[Prefill, Scores]]) -> dict[str, Callable[[float], Allocation]]:
    """Returns the allocations that take no amount, each made of a number in [0, 1), the stricter the larger it is."""
    free = torch.cat([_free_values(one, scores) for one, scores in scored]).sort().values.tolist()

    def per_head(part: float) -> Allocation:
        return Tolerance(tolerance=part)

    def per_layer(part: float) -> Allocation:
        return Tolerance(tolerance=part, per="layer")

    def threshold(part: float) -> Allocation:
        return Threshold(threshold=free[int(part * len(free))])

    return {"tolerance a head": per_head, "tolerance a layer": per_layer, "threshold": threshold}


def _that_keeps(
    kept: float, scored: Sequence[tuple[Prefill, Scores]], allocation: Callable[[float], Allocation]
) -> Allocation:
    """Returns the allocation under which contexts keep about this fraction of their pairs, on average."""
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        fractions = [_kept(one, scores.asked_for(0.0, allocation(middle))) for one, scores in scored]
        low, high = (middle, high) if _mean(fractions) > kept else (low, middle)
    return allocation(low)


def _free_values(done: Prefill, scores: Scores) -> torch.Tensor:
    """Returns the scores of all pairs that may be evicted, on the CPU."""
    free = (done.valid & ~scores.protected).cpu()[:, None]
    return torch.cat([values.cpu()[free.expand_as(values)] for values in scores.layers.values()])


def _kept(done: Prefill, scores: Scores) -> float:
    masks = select(done.attended(scores), done.valid).values()
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def _add(found: dict[Any, Any], key: tuple[str, str, float], followed: Followed, cache: RaggedCache) -> None:
    before, pages = found.get(key, (Followed(), []))
    found[key] = before + followed, [*pages, [_in_pages(cache, size) for size in PAGE_SIZES]]


def _in_pages(cache: RaggedCache, page_size: int) -> float:
    """Returns the pairs of the pages that hold a cache, of all pairs of its context."""
    held = every = 0
    for _, layer in cache.ragged_layers():
        lengths = layer.packed.seqlens
        held += int((-(-lengths // page_size) * page_size).sum())
        every += lengths.numel() * layer.n_context
    return held / every


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shown(task_name: str, found: dict[tuple[str, str, float], tuple[Followed, list[list[float]]]]) -> Shown:
    columns = ("scorer", "allocation", "removed", *COLUMNS, "kept, least to most", "in pages of 16", "of 64")
    table = Shown(*columns, box=None, pad_edge=False, title=task_name)
    for (name, label, ratio), (followed, pages) in found.items():
        spread = f"{min(followed.kept):.3f} to {max(followed.kept):.3f}"
        of_pages = [f"{_mean(part):.3f}" for part in zip(*pages, strict=True)]
        table.add_row(name, label, f"{ratio:g}" if ratio else "", *followed.cells(), spread, *of_pages)
    return table


if __name__ == "__main__":
    typer.run(main)
