"""What evicting while the model writes costs a decode step, beside the same step over as many tokens that stay.

``python -m kvzip_press.leaderboard.benchmarks.eviction_cost --shape llama3.1-8b --budget 4096 --buffer 128`` times
whole periods of each press: ``buffer`` steps, the last of which evicts. Steps without a press are timed over a cache
that has as many tokens on average. Both take turns, on caches made of random numbers; ``--buffer 1`` evicts at each.
``--profile DIR`` also writes what evictions spend their time with, a text for each press.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.benchmarks.eviction_parts import spent
from kvzip_press.leaderboard.benchmarks.periods import Period, empty, measured_model, period, steps_ms
from kvzip_press.model.devices import get_device
from kvzip_press.press import Press
from kvzip_press.registry import get_press

PRESSES = ("streaming_llm_decode", "knorm_decode", "tova_decode", "snapkv_decode", "h2o", "kv_compress", "rkv")


def main(
    shape: Annotated[str | None, typer.Option(help="A published shape, with random weights.")] = None,
    model: Annotated[str | None, typer.Option(help="Or a model, by path or hub id, or smollm2.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="Presses; several times. Default: all.")] = None,
    budget: Annotated[int, typer.Option(help="Tokens' worth of pairs that stay.")] = 4096,
    buffer: Annotated[
        list[int] | None, typer.Option(help="Tokens between two evictions; several. Default 128.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Batch rows.")] = 1,
    turns: Annotated[int, typer.Option(help="Times that both are timed.")] = 2,
    steps: Annotated[int, typer.Option(help="Least steps of a turn.")] = 64,
    profile: Annotated[Path | None, typer.Option(help="Folder for what evictions spend their time with.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Times all and prints a table."""
    if (shape is None) == (model is None):
        raise InvalidArgumentError("expected exactly one of --shape and --model")
    cases = [
        (name, every, get_press(name, budget=budget, buffer=every))
        for every in buffer or [128]
        for name in press or PRESSES
    ]
    loaded = measured_model(shape, model, get_device(device))
    title = f"{shape or model}, {rows} rows of {budget} tokens, {loaded.device.type}"
    table = Table("press", "buffer", "ms a step", "without", "more", "a step that evicts, ms", title=title)
    for name, every, chosen in track(cases, description="presses", transient=True):
        table.add_row(name, str(every), *_figures(loaded, chosen, rows, budget, every, turns, steps))
        if profile is not None:
            profile.mkdir(parents=True, exist_ok=True)
            parts = spent(loaded, chosen, rows, budget, every).text()
            (profile / f"{name}-{every}.txt").write_text(f"{title}: {name}, every {every}\n\n{parts}")
            empty(loaded.device)
    Console().print(table)


def _figures(
    model: Any, press: Press, rows: int, budget: int, buffer: int, turns: int, steps: int
) -> tuple[str, str, str, str]:
    n_periods = -(-steps // buffer)
    n_steps = n_periods * buffer
    found: list[tuple[Period, float]] = []
    for _ in range(turns):
        evicting = period(model, press, rows, budget, buffer, n_periods=n_periods)
        empty(model.device)
        found.append((evicting, steps_ms(model, rows, max(budget + (buffer - n_steps) // 2, 1), n_steps)))
        empty(model.device)
    ms, without = (statistics.median(values) for values in zip(*((one.ms, other) for one, other in found), strict=True))
    more = statistics.median(one.ms / other for one, other in found) - 1
    of_eviction = statistics.median(one.evicting_ms for one, _ in found)
    return f"{ms:.2f}", f"{without:.2f}", f"{more:+.1%}".replace("%", " %"), f"{of_eviction:.1f}"


if __name__ == "__main__":
    typer.run(main)
