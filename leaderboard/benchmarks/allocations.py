"""All allocations of a budget under several scorers, at equal bytes: how closely each follows the full cache.

``python -m kvzip_press.leaderboard.benchmarks.allocations --task hidden_facts --scorer kvzip --contexts 34``

Each context is read once, and scored once by each scorer. "table" has shares that are searched on other contexts of the
task (BaKlaVa-style). "tolerance" and "threshold" take no ratio: they get the tolerance, or the threshold, under which
other contexts of the task keep as much as the ratio says, and what they then keep of each context is in the table, from
the least to the most. ``--tolerance`` adds fixed tolerances (ReFreeKV's own is 0.05).

Contexts are spread over ``--workers`` processes; the figures are the same for any number. With ``--output`` a run that
was stopped goes on where it was: what is known of each context lies beside that file until all is.

The last two columns are what an engine with pages of 16 or of 64 pairs a head would hold, as a fraction of all pairs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table as Shown

from kvzip_press import Prefill, RaggedCache, Scores, get_press, prefill
from kvzip_press.budget.allocation import allocate
from kvzip_press.budget.allocators import Allocation, Pages, Table, Threshold, Tolerance, allocation_of
from kvzip_press.budget.allocators.by_name import mapping_of
from kvzip_press.heads.share_search import find_shares
from kvzip_press.leaderboard.benchmarks.following import COLUMNS, Asked, Comparing, Followed, samples_of
from kvzip_press.leaderboard.benchmarks.parts import Part, Parts, parts_of
from kvzip_press.leaderboard.samples.task import Sample, Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_on
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

    def to_json(self) -> dict[str, Any]:
        """Returns the cell as JSON has it; :meth:`of_json` makes it again."""
        return {"label": self.label, "removed": self.removed, "allocation": mapping_of(self.allocation)}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Cell:
        """Returns the cell that :meth:`to_json` wrote."""
        return cls(values["label"], values["removed"], allocation_of(values["allocation"]))


@dataclass(frozen=True)
class Asking:
    """The contexts of a run, and what is asked of them: see the options of :func:`main`."""

    contexts: int
    tokens: int
    others: int
    answer_tokens: int
    seed: int


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
    workers: Annotated[int, typer.Option(help="Processes, which share the GPUs.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the comparison and prints a table for each task."""
    names, ratios = scorer or ["kvzip", "snapkv", "expected_attention"], removed or [0.7, 0.9]
    asked = Asking(contexts, tokens, others, answer_tokens, seed)
    made_by: dict[str, Any] = {"model": model, "dtype": "", "seed": seed, "contexts": contexts, "tokens": tokens}
    settings = {"benchmark": "allocations", "model": model, **asdict(asked)}
    del settings["contexts"]  # more of them only add
    rows: list[dict[str, Any]] = []
    make = functools.partial(Comparison, load_on, model, asked)
    with parts_of(make, device=device, workers=workers, settings=settings, output=output) as parts:
        for task_name in task or list(TASKS):
            cells = _all_cells(parts, task_name, names, ratios, tolerance or [0.01, 0.05])
            given = {name: [cell.to_json() for cell in of_name] for name, of_name in cells.items()}
            calls = [Part("follow", (task_name, n, given)) for n in range(contexts)]
            found: dict[tuple[str, str, float], tuple[Followed, list[list[float]]]] = {}
            for of_context in parts.results(calls, task_name):
                made_by["dtype"] = of_context["dtype"]
                for name, label, ratio, followed, in_pages in of_context["rows"]:
                    before, pages = found.get((name, label, ratio), (Followed(), []))
                    found[name, label, ratio] = before + Followed.of(followed), [*pages, in_pages]
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
        said = f"{model} in {made_by['dtype']}, {contexts} contexts of {tokens} tokens a task, seed {seed}"
        Console().print(plain(said))
        if output is not None:
            output.write_text(json.dumps({**made_by, "cells": rows}, indent=1) + "\n", encoding="utf-8")


class Comparison(Comparing):
    """What a process does: makes cells of a scorer, and asks the caches of a context."""

    asked: Asking

    @functools.cached_property
    def samples(self) -> dict[str, Sequence[Sample]]:
        """Of each task, made once."""
        return {}

    def cells(self, task_name: str, name: str, ratio: float) -> list[dict[str, Any]]:
        """Returns the cells of a scorer at a ratio, as JSON."""
        asked = self.asked
        other = samples_of(self.tokenizer, _task(task_name), asked.others, asked.tokens, asked.seed + 1)
        made = _cells(self.model, self.tokenizer, name, [one.context for one in other], ratio)
        return [cell.to_json() for cell in made]

    def follow(self, task_name: str, number: int, cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Returns the dtype, and of a context and each cell: scorer, label, ratio, what it followed, and its pages."""
        asked, task = self.asked, _task(task_name)
        if task_name not in self.samples:
            self.samples[task_name] = samples_of(self.tokenizer, task, asked.contexts, asked.tokens, asked.seed)
        sample = self.samples[task_name][number]
        observers = [get_press(name, 0.0) for name in cells]
        done = prefill(self.model, self.tokenizer, sample.context, observers=observers)
        full = done.evict(get_press("none").score(done))
        questions = Asked.of(self.model, self.tokenizer, full, task, sample, asked.answer_tokens)
        rows = [_row("full cache", "", 0.0, questions.follow(self.model, full), full)]
        attention = done.last_attention()
        for name, of_name in cells.items():
            scores = replace(get_press(name, 0.0).score(done), attention=attention)
            every = [Cell.of_json(values) for values in of_name]
            caches = [done.evict(scores, cell.removed, cell.allocation) for cell in every]
            for cell, cache, one in zip(
                every, caches, questions.follow_all(self.model, caches, full=full), strict=True
            ):
                rows.append(_row(name, cell.label, cell.removed, one, cache))
        return {"dtype": self.dtype, "rows": rows}


def _all_cells(
    parts: Parts, task_name: str, names: Sequence[str], ratios: Sequence[float], tolerances: Sequence[float]
) -> dict[str, list[Cell]]:
    """Returns the cells of each scorer."""
    calls = [Part("cells", (task_name, name, ratio)) for name in names for ratio in ratios]
    made = iter(parts.results(calls, f"{task_name}: tables and tolerances"))
    return {name: [*(Cell.of_json(one) for _ in ratios for one in next(made)), *_fixed(tolerances)] for name in names}


def _task(name: str) -> Task:
    return get_task(name, **TASKS.get(name, {}))


def _row(name: str, label: str, removed: float, followed: Followed, cache: RaggedCache) -> list[Any]:
    return [name, label, removed, asdict(followed), [_in_pages(cache, size) for size in PAGE_SIZES]]


def _fixed(tolerances: Sequence[float]) -> Iterator[Cell]:
    for one in tolerances:
        for per in ("head", "layer"):
            yield Cell(f"tolerance {one:g} a {per}", 0.0, Tolerance(tolerance=one, per=per))


def _cells(model: Any, tokenizer: Any, name: str, texts: Sequence[str], ratio: float) -> Iterator[Cell]:
    """Yields the allocations of a scorer at a ratio, made on other texts where they have to be."""
    press = get_press(name, 0.0)
    done = [prefill(model, tokenizer, text, observers=[press]) for text in texts]
    scored = [(one, replace(press.score(one), attention=one.last_attention())) for one in done]
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
    """Returns the fraction of pairs that an eviction would keep, of which only the counts are made."""
    counts = allocate(done.attended(scores), done.valid)
    protected, every = int((done.valid & scores.protected).sum()), done.valid.numel()
    n_heads = sum(of_layer.numel() for of_layer in counts.values())
    kept = int(torch.cat([of_layer.flatten() for of_layer in counts.values()]).sum())
    return (kept + protected * n_heads) / (every * n_heads)


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
