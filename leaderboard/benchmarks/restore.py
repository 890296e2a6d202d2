"""Eviction that is undone: sizes, times and the second prefill that it saves; and what a monitor wins back.

``python -m kvzip_press.leaderboard.benchmarks.restore --tokens 450 --tokens 1800``

The first table compares bringing everything back with reading the context again, which gives the same cache, bit for
bit (checked before a time is taken), and the scoring that would follow. The second asks questions of a cache from which
most was evicted, and of the full one where the model's least margin, or its greatest entropy, is beyond a bound: for
each bound, how often that is, what is right then and how many bytes answered, on average.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press import RaggedCache, answer_restoring, get_press, prefill
from kvzip_press.leaderboard.benchmarks.following import samples_of
from kvzip_press.leaderboard.samples.task import Sample, Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.devices import synchronize
from kvzip_press.terminal import plain


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a context of the first table; several.")] = None,
    removed: Annotated[float, typer.Option(help="Fraction of pairs removed, first table.")] = 0.7,
    repeats: Annotated[int, typer.Option(help="Times that each time is taken.")] = 3,
    contexts: Annotated[int, typer.Option(help="Contexts of the second table; 0 leaves it out.")] = 20,
    keys: Annotated[int, typer.Option(help="Facts, and questions, a context.")] = 6,
    length: Annotated[int, typer.Option(help="Tokens of a context of the second table.")] = 450,
    lossy: Annotated[float, typer.Option(help="Fraction of pairs removed, second table.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 17,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Runs both and prints them."""
    loaded, tokenizer = load_on(model, device)
    task: Task = get_task("hidden_facts", n_keys=keys)

    def samples(n: int, length_tokens: int) -> Sequence[Sample]:
        return samples_of(tokenizer, task, n, length_tokens, seed)

    lengths = tokens or [450, 1800]
    columns = [_times(loaded, tokenizer, samples(1, n)[0].context, removed, repeats) for n in lengths]
    times = Table("", *(f"{n} tokens" for n in lengths))
    for name in columns[0]:
        times.add_row(name, *(column[name] for column in columns))
    Console().print(times)
    Console().print(
        plain(f"{model}, {removed:.0%} removed by KVzip and brought back, median of {repeats}; CPU time on a CPU")
    )
    if contexts:
        asked = [
            _asked(loaded, tokenizer, task, sample, lossy)
            for sample in track(samples(contexts, length), description="contexts", transient=True)
        ]
        Console().print(_monitored([one for of_context in asked for one in of_context]))
        Console().print(plain(f"{model}, {contexts} contexts of {length} tokens, {lossy:.0%} removed by KVzip"))


def _times(model: Any, tokenizer: Any, context: str, removed: float, repeats: int) -> dict[str, str]:
    """Returns a column of the first table: a figure by its name."""
    press = get_press("kvzip", removed)
    # on a CPU that others use too, the time of the process says more than the clock on the wall
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        seconds, result = [], None
        for _ in range(repeats):
            synchronize(model.device)
            begin = clock()
            result = call()
            synchronize(model.device)
            seconds.append(clock() - begin)
        return statistics.median(seconds), result

    def read() -> Any:
        done = prefill(model, tokenizer, context)
        return done, press.score(done)

    reading, (done, scores) = timed(read)
    evicting, small = timed(lambda: done.evict(scores))
    keeping, cache = timed(lambda: done.evict(scores, cold="cpu"))
    full = done.evict(scores, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        filed = done.evict(scores, cold=Path(folder) / "evicted")
        restored = cache.fork()
        _check_same(restored, small)
        restored.restore()
        _check_same(restored, full)
        # a fork is restored each time: the cache itself stays small
        restoring, _ = timed(lambda: cache.fork().restore())
        from_file, _ = timed(lambda: filed.fork().restore())
        shrinking, _ = timed(lambda: restored.fork().shrink(removed))
    sizes = {
        "evicted, on the device": small.resident_bytes,
        "restored, on the device": full.resident_bytes,
        "kept elsewhere": cache.cold_bytes,
    }
    seconds = {
        "read and score": reading,
        "evict": evicting,
        "evict and keep": keeping,
        "restore from memory": restoring,
        "restore from a file": from_file,
        "shrink": shrinking,
    }
    shown = {name: f"{size / 1e6:.1f} MB" for name, size in sizes.items()}
    return shown | {name: f"{one:.3f} s" for name, one in seconds.items()}


def _check_same(one: RaggedCache, other: RaggedCache) -> None:
    """Raises unless two caches hold the same pairs, bit for bit."""
    for (_, layer), (_, expected) in zip(one.ragged_layers(), other.ragged_layers(), strict=True):
        pairs = zip(layer.packed.tensors, expected.packed.tensors, strict=True)
        if not all(torch.equal(got, wanted) for got, wanted in pairs):
            raise AssertionError("a restored cache differs from one of which less was evicted")


@dataclass(frozen=True)
class _Answered:
    """A question, answered by the small cache and by all pairs: how sure, how good, and from how many bytes."""

    margin: float
    entropy: float
    scores: tuple[float, float]
    sizes: tuple[int, int]


def _asked(model: Any, tokenizer: Any, task: Task, sample: Sample, removed: float) -> list[_Answered]:
    done = prefill(model, tokenizer, sample.context)
    cache = done.evict(get_press("kvzip", removed).score(done), cold="cpu")
    restored = cache.fork()
    restored.restore()
    answered = []
    for question in sample.questions:
        asked = (question.text, question.answer_prefix, question.max_new_tokens)
        small = answer_restoring(model, tokenizer, cache, *asked, min_margin=0.0)
        full = answer_restoring(model, tokenizer, restored, *asked, min_margin=0.0)
        scores = (task.score(small.text, question), task.score(full.text, question))
        answered.append(_Answered(small.margin, small.entropy, scores, (small.resident_bytes, full.resident_bytes)))
    return answered


def _monitored(answered: Sequence[_Answered]) -> Table:
    """Returns the second table."""
    table = Table("asked again if", "asked again", "accuracy", "won back", "mean bytes")
    lost = statistics.mean(one.scores[1] - one.scores[0] for one in answered)
    full_bytes = sum(one.sizes[1] for one in answered)
    again: dict[str, list[bool]] = {"never": [False] * len(answered)}
    for bound in (0.05, 0.1, 0.2, 0.4, 0.6):
        again[f"margin < {bound}"] = [one.margin < bound for one in answered]
    for bound in (2.0, 1.5, 1.0, 0.7):
        again[f"entropy > {bound}"] = [one.entropy > bound for one in answered]
    again["always"] = [True] * len(answered)
    first = statistics.mean(one.scores[0] for one in answered)
    for name, which in again.items():
        accuracy = statistics.mean(one.scores[large] for one, large in zip(answered, which, strict=True))
        size = sum(one.sizes[large] for one, large in zip(answered, which, strict=True)) / full_bytes
        won = f"{(accuracy - first) / lost:.0%}" if lost else ""
        table.add_row(name, f"{statistics.mean(which):.0%}", f"{accuracy:.2f}", won, f"{size:.0%}")
    return table


if __name__ == "__main__":
    typer.run(main)
