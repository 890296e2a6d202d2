"""How many long answers fit on a device at once and how fast they are written, with and without eviction.

``python -m kvzip_press.leaderboard.benchmarks.long_answers --shape llama3.1-8b --answer 16384 --budget 1024`` finds the
most rows for each of three caches by trying, times decode steps with these rows, and adds the times up to whole
answers:

- a press that evicts while the model writes: rows of ``budget`` to ``budget + buffer`` tokens, over a whole period, its
  eviction included. The beginning, in which rows are shorter, counts as if they were as long;
- the full cache in our own steps (a CUDA graph over memory that was reserved for the whole answer), at several lengths;
- the full cache of transformers, as its ``generate`` runs it, at the same lengths.

Weights and pairs are random numbers, and all rows are equally long: neither changes the time of a step. What is assumed
is printed with what was measured. On a CPU there is nothing to fill, so the numbers of rows have to be given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press import compat
from kvzip_press.attention.implementation import detach
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.benchmarks.made_caches import bytes_of_a_token, dynamic_cache
from kvzip_press.leaderboard.benchmarks.periods import (
    Period,
    empty,
    free_bytes,
    mean_ms,
    measured_model,
    period,
    steps_ms,
)
from kvzip_press.model.devices import get_device
from kvzip_press.press import Press
from kvzip_press.registry import get_press
from kvzip_press.terminal import plain

TRIED = (8, 24)  # rows with which the memory of a row is found
MARGIN = 0.98  # of the memory that is free: allocators leave gaps
SHRINK, GROWTH = 0.94, 1.04  # of rows, from one try to the next


@dataclass(frozen=True)
class Result:
    """One cache with as many rows as fit.

    Attributes:
        rows: Number of rows.
        ms: Milliseconds of a step at each length, by length in tokens.
        seconds: Of whole answers of all rows.
        n_tokens: Tokens of an answer.
        notes: What happened: the rows that were tried, whether steps were captured.
    """

    rows: int
    ms: dict[int, float]
    seconds: float
    n_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def tokens_a_second(self) -> float:
        """Tokens that all rows together are given in a second."""
        return self.rows * self.n_tokens / self.seconds


def main(
    shape: Annotated[str | None, typer.Option(help="A published shape, with random weights.")] = None,
    model: Annotated[str | None, typer.Option(help="Or a model, by path or hub id, or smollm2.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="Presses; several times.")] = None,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.")] = 16384,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    budget: Annotated[int, typer.Option(help="Tokens' worth of pairs that stay.")] = 1024,
    buffer: Annotated[int, typer.Option(help="Tokens between two evictions.")] = 128,
    lengths: Annotated[int, typer.Option(help="Lengths at which full caches are timed, at least 2.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps timed at each.")] = 8,
    rows: Annotated[int | None, typer.Option(help="Rows of an evicting cache, instead of the most that fit.")] = None,
    full_rows: Annotated[int | None, typer.Option(help="The same of the full caches.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Measures and prints all."""
    place, names = get_device(device), press or ["rkv"]
    if (shape is None) == (model is None):
        raise InvalidArgumentError("expected exactly one of --shape and --model")
    if place.type != "cuda" and (rows is None or full_rows is None):
        raise InvalidArgumentError("expected --rows and --full-rows on a CPU, whose memory is not to be filled")
    if lengths < 2 or steps < 1:
        raise InvalidArgumentError(f"expected 2 or more lengths and 1 or more steps, got {lengths} and {steps}")
    presses = {name: get_press(name, budget=budget, buffer=buffer) for name in names}
    begin = time.perf_counter()
    loaded = measured_model(shape, model, place)
    filled = [prompt + answer * part // (lengths - 1) for part in range(lengths)]
    console, a_token = Console(), bytes_of_a_token(loaded)
    full = _most(loaded, full_rows, a_token * (prompt + answer + steps))
    results = {}
    for name, timed in (("full cache, ours", steps_ms), ("full cache, transformers", _plain)):
        results[name] = _written(loaded, full, filled, steps, timed, shrinks=full_rows is None)
        console.print(plain(f"{name}: {results[name].tokens_a_second:.0f} tokens/s"))
    for name, chosen in presses.items():
        results[name] = _evicting(loaded, chosen, budget, buffer, rows, answer)
        console.print(plain(f"{name}: {results[name].tokens_a_second:.0f} tokens/s"))
    console.print(_table(results, loaded, f"{shape or model}, answers of {answer} tokens behind {prompt}"))
    for name, result in results.items():
        ms = ", ".join(f"{value:.2f} at {length}" for length, value in result.ms.items())
        console.print(plain(f"{name}: ms of a step {ms}. {' '.join(result.notes)}"))
    console.print(
        plain(
            f"Budget {budget}, buffer {buffer}. Random weights and pairs; rows equally long; an evicting row counts as "
            "long as it is between two evictions from its first token on; of a full cache, steps between two measured "
            f"lengths take as long as on the straight line between them. {time.perf_counter() - begin:.0f} s."
        )
    )


def _most(model: Any, rows: int | None, row_bytes: float) -> int:
    """Returns how many rows of so many bytes there is memory for, unless their number is given."""
    if rows is not None:
        return rows
    return max(int(MARGIN * _free_bytes(model.device) / row_bytes), 1)


def _free_bytes(device: torch.device) -> int:
    empty(device)
    return free_bytes(device)


# Full caches --------------------------------------------------------------------------------------------------------


def _written(
    model: Any, rows: int, filled: Sequence[int], steps: int, timed: Callable[..., float], *, shrinks: bool
) -> Result:
    """Times a full cache at several lengths, with the most rows up to ``rows`` that the longest leaves room for."""
    tried, ms = [], {}
    while True:
        empty(model.device)
        try:
            ms[filled[-1]] = timed(model, rows, filled[-1], steps)
            break
        except torch.OutOfMemoryError:
            tried.append(rows)
            if not shrinks or rows == 1:
                raise
            rows = max(int(rows * SHRINK), 1)
    for length in filled[:-1]:
        empty(model.device)
        ms[length] = timed(model, rows, length, steps)
    empty(model.device)
    ms = dict(sorted(ms.items()))
    seconds = sum((after - before) * (ms[before] + ms[after]) / 2e3 for before, after in pairwise(filled))
    return Result(rows, ms, seconds, filled[-1] - filled[0], _about(tried))


def _about(tried: Sequence[int]) -> tuple[str, ...]:
    return (f"Out of memory with {', '.join(map(str, tried))} rows.",) if tried else ()


def _plain(model: Any, rows: int, n_tokens: int, steps: int) -> float:
    """Milliseconds of the model's own forward over transformers' cache."""
    detach(model)
    cache = dynamic_cache(model, rows, n_tokens)

    @torch.no_grad()
    def step(tokens: torch.Tensor) -> Any:
        return model(tokens[:, None], use_cache=True, logits_to_keep=1, **compat.cache_argument(model, cache)).logits

    return mean_ms(step, rows, model.device, steps)


# Evicting caches ----------------------------------------------------------------------------------------------------


def _evicting(model: Any, press: Press, budget: int, buffer: int, rows: int | None, answer: int) -> Result:
    """Times a period of an evicting cache with the most rows that fit, or with so many."""

    def run(n_rows: int) -> Period:
        try:
            return period(model, press, n_rows, budget, buffer)
        finally:
            empty(model.device)

    tried: list[int] = []
    found, timed = (rows, run(rows)) if rows is not None else _most_that_run(model, run, tried)
    notes = [*_about(tried), f"The step that evicts takes {timed.evicting_ms:.0f} ms."]
    if timed.peak is not None:
        worth = timed.peak / found / bytes_of_a_token(model)
        notes.append(f"At most {timed.peak / 1e9:.1f} GB beside the weights, {worth:.0f} tokens' worth a row.")
    return Result(found, {budget + buffer // 2: timed.ms}, answer * timed.ms / 1e3, answer, tuple(notes))


def _most_that_run(model: Any, run: Callable[[int], Period], tried: list[int]) -> tuple[int, Period]:
    """Returns the most rows that run out of no memory: begins where two small caches say, then goes up or down."""
    small, large = (run(rows).peak or 0 for rows in TRIED)
    a_row = max((large - small) / (TRIED[1] - TRIED[0]), 1)
    rows = TRIED[1] + int(MARGIN * (_free_bytes(model.device) - large) / a_row)
    best: tuple[int, Period] | None = None
    while True:
        empty(model.device)  # an error holds what it ran out with, until it is dealt with
        try:
            best = rows, run(rows)
        except torch.OutOfMemoryError:
            tried.append(rows)
            if best is None and rows == 1:
                raise
            if best is not None:
                return best
            rows = max(int(rows * SHRINK), 1)
        else:
            if tried:
                return best
            room = MARGIN * _free_bytes(model.device) / max(best[1].peak or 0, 1)
            rows = max(int(rows * GROWTH) + 1, int(rows * room))


def _table(results: dict[str, Result], model: Any, title: str) -> Table:
    place = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    table = Table("cache", "rows", "tokens/s", "of ours, full", "of transformers'", title=f"{title}; {place}")
    ours, theirs = (results[name].tokens_a_second for name in ("full cache, ours", "full cache, transformers"))
    for name, one in results.items():
        speed = one.tokens_a_second
        table.add_row(name, str(one.rows), f"{speed:.0f}", f"{speed / ours:.2f}", f"{speed / theirs:.2f}")
    return table


if __name__ == "__main__":
    typer.run(main)
