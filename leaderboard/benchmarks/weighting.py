"""Times what weighting KVzip's rows by surprisal costs: the head in the prefill, and the weights in the scoring.

``python -m kvzip_press.leaderboard.benchmarks.weighting --model Qwen/Qwen2.5-Coder-0.5B-Instruct --tokens 16000``
"""

import statistics
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press import Press, get_press, load_model, prefill
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.terminal import plain


def main(
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Tokens of the context.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Measurements of each, in turns; medians are shown.")] = 5,
) -> None:
    """Runs the comparison and prints it."""
    loaded, tokenizer = load_model(model)
    task = get_task("hidden_facts", n_keys=4)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    context = next(iter(task.samples(seed=1, n=1, length_tokens=tokens, count_tokens=count))).context
    presses = {
        (replay, weighting): get_press(f"kvzip{replay}", weighting=weighting)
        for replay in ("", "_local")
        for weighting in (None, "surprisal")
    }
    seconds: dict[tuple[str, str | None], list[tuple[float, float]]] = {key: [] for key in presses}
    for turn in range(repeats + 1):
        for key, press in presses.items():
            if measured := _seconds(loaded, tokenizer, context, press):
                seconds[key] += [measured] if turn else []  # the first turn warms up
    table = Table("press", "weighting", "prefill s", "scoring s", "more than without, of scoring")
    medians = {key: [statistics.median(part) for part in zip(*found, strict=True)] for key, found in seconds.items()}
    for (replay, weighting), (read, scored) in medians.items():
        base = medians[replay, None]
        more = "" if weighting is None else f"{(read - base[0] + scored - base[1]) / base[1]:+.1%}"
        table.add_row(f"kvzip{replay}", weighting or "none", f"{read:.4f}", f"{scored:.4f}", more)
    Console().print(table)
    Console().print(plain(f"{model}, {tokens} tokens, medians of {repeats} runs in turns"))


def _seconds(model: torch.nn.Module, tokenizer: object, context: str, press: Press) -> tuple[float, float]:
    """Returns the seconds of a prefill that the press watches, and of scoring it."""
    done = prefill(model, tokenizer, context, observers=[press])
    _wait()
    begin = time.perf_counter()
    press.score(done)
    _wait()
    return done.seconds, time.perf_counter() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
