"""Compares KVzip's full and local replay on the same contexts: accuracy, kept pairs in common, scoring time.

``python -m kvzip_press.leaderboard.benchmarks.replay --contexts 8 --tokens 1200 --chunk-size 256``

Chunks are small so that a context of this length has several of them, as a long one has at the default of 2048. With a
single chunk the two replays are the same.
"""

import statistics
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press import answer, get_press, load_model, prefill
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.leaderboard.benchmarks.following import samples_of
from kvzip_press.leaderboard.samples.task import Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.terminal import plain

REMOVED = (0.5, 0.7, 0.9)


def main(
    contexts: Annotated[int, typer.Option(help="Contexts.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 1200,
    keys: Annotated[int, typer.Option(help="Facts, and questions, a context.")] = 6,
    chunk_size: Annotated[int, typer.Option(help="Context tokens replayed at a time.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 17,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
) -> None:
    """Runs the comparison and prints it."""
    loaded, tokenizer = load_model(model)
    task: Task = get_task("hidden_facts", n_keys=keys)
    samples = samples_of(tokenizer, task, contexts, tokens, seed)
    hits: dict[tuple[str, float], list[float]] = {}
    overlaps: dict[float, list[float]] = {ratio: [] for ratio in REMOVED}
    seconds: dict[str, list[float]] = {}
    for sample in track(samples, description="contexts", transient=True):
        done = prefill(loaded, tokenizer, sample.context)
        scored: dict[str, Scores] = {}
        for name in ("none", "kvzip", "kvzip_local"):
            press = get_press(name, **({} if name == "none" else {"chunk_size": chunk_size}))
            begin = time.perf_counter()
            scored[name] = press.score(done)
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
        for ratio in REMOVED:
            overlaps[ratio].append(_overlap(scored["kvzip"], scored["kvzip_local"], done.valid, ratio))
        for name, ratio in [("none", 0.0), *((n, r) for n in ("kvzip", "kvzip_local") for r in REMOVED)]:
            cache = done.evict(scored[name], ratio)
            for q in sample.questions:
                said = answer(loaded, tokenizer, cache, q.text, q.answer_prefix, q.max_new_tokens)
                hits.setdefault((name, ratio), []).append(task.score(said, q))
    table = Table("press", "removed", "accuracy", "scoring s", "kept in common")
    for (name, ratio), scores in hits.items():
        common = f"{statistics.mean(overlaps[ratio]):.2f}" if name == "kvzip_local" else ""
        cost = f"{statistics.median(seconds[name]):.2f}"
        table.add_row(name, f"{ratio:.1f}", f"{statistics.mean(scores):.2f}", cost, common)
    questions = contexts * keys
    Console().print(table)
    Console().print(plain(f"{model}, {contexts} contexts of {tokens} tokens, {questions} questions a row, seed {seed}"))


def _overlap(a: Scores, b: Scores, valid: torch.Tensor, ratio: float) -> float:
    """Returns the number of pairs that both keep, divided by the number that each keeps."""
    kept = [select(scores.asked_for(ratio), valid) for scores in (a, b)]
    both = sum(int((kept[0][i] & kept[1][i]).sum()) for i in kept[0])
    return both / sum(int(mask.sum()) for mask in kept[0].values())


if __name__ == "__main__":
    typer.run(main)
