"""Times decode steps that recall a part of a long context, beside one that reads it all, and says where the bytes lie.

``python -m kvzip_press.leaderboard.benchmarks.recall_time --shape llama3.1-8b --context-length 65536 --budget 2048``

The weights are random: times and bytes do not depend on their values. "Grouped" is the time to divide the pairs into
groups (or nothing). Bytes in memory are those that the cache says, and those that the process has allocated on the GPU
beyond the model's, which include what a step needs for itself.
"""

import statistics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press import ClusterRecall, DecodeStep, PageRecall, RaggedCache, get_press, with_recall
from kvzip_press.cache.recall.policy import Recall
from kvzip_press.leaderboard.profile.measure import Memory, Subject
from kvzip_press.leaderboard.profile.shapes import get_shape, random_model
from kvzip_press.model.devices import get_device, now, timed
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.terminal import plain

WARMUP = 3


def main(
    shape: Annotated[str, typer.Option(help="Name of a model's shape.")] = "llama3.1-8b",
    context_length: Annotated[int, typer.Option(help="Context tokens.")] = 65536,
    budget: Annotated[int, typer.Option(help="Pairs that a head reads in a step.")] = 2048,
    steps: Annotated[int, typer.Option(help="Decode steps that are timed.")] = 40,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Measures each way of reading in turn and prints a table."""
    where = get_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    subject = Subject(shape, random_model(get_shape(shape), where, dtype))
    Console().print(compared(subject, context_length, budget, steps))
    Console().print(plain(f"{shape}, {context_length} tokens, {where.type}, {dtype}; medians of {steps} steps"))


def compared(subject: Subject, context_length: int, budget: int, steps: int) -> Table:
    """Reads a context, and measures every way of reading it; those from host memory come last, without a copy of it."""
    ids, memory = subject.context(context_length), Memory(subject.device)
    done = run_prefill(subject.model, ids, torch.ones_like(ids, dtype=torch.bool))
    done.evict_in_place(get_press("none").score(done))
    cache = RaggedCache.of(done.cache)
    del done
    table = Table("read by", "grouped, s", "eager, ms", "graph, ms", "device, GB", "host, GB", "peak of a step, GB")
    clusters, pages = ClusterRecall(budget=budget), PageRecall(budget=budget)
    ways: dict[str, tuple[Recall | None, bool]] = {
        "all pairs": (None, False),
        "clusters": (clusters, False),
        "clusters, each query head": (ClusterRecall(budget=budget, per_query_head=True), False),
        "pages": (pages, False),
        "pages, from host memory": (pages, True),
        "clusters, from host memory": (clusters, True),
    }
    for name, (recall, offload) in ways.items():
        begin = now(subject.device)
        read = cache if recall is None else with_recall(cache, recall, offload=offload)
        seconds = now(subject.device) - begin
        if offload:
            cache = read  # only host memory holds these pairs from here on
        memory.restart()
        eager = _milliseconds(subject, read, steps, graph=False)
        peak = memory.peak()
        has_graph = subject.device.type == "cuda" and not offload
        graph = f"{_milliseconds(subject, read, steps, graph=True):.2f}" if has_graph else ""
        sizes = (f"{size / 1e9:.3f}" for size in (read.resident_bytes, read.host_bytes))
        of_step = "" if peak is None else f"{peak / 1e9:.3f}"
        table.add_row(name, f"{seconds:.2f}", f"{eager:.2f}", graph, *sizes, of_step)
    return table


def _milliseconds(subject: Subject, cache: RaggedCache, steps: int, *, graph: bool) -> float:
    """Returns the median time of a step."""
    token = torch.tensor([7], device=subject.device)
    with DecodeStep(subject.model, cache.fork(), max_new_tokens=WARMUP + steps, graph=graph) as step:
        seconds = [timed(subject.device, step, token)[1] for _ in range(WARMUP + steps)]
    return statistics.median(seconds[WARMUP:]) * 1e3


if __name__ == "__main__":
    typer.run(main)
