"""Measures what recall finds: of the pairs that a step would attend to most, and of what the full cache would say.

``python -m kvzip_press.leaderboard.benchmarks.recall --contexts 2 --tokens 2000 --budget 128 --budget 256``

The full cache writes an answer to each question about a context, which is then read again, token by token. "Found" is
the share of the top pairs that a step lists: of each query head, layer and token, as many pairs of the context as the
budget has, by exact attention. "Mass" is the attention of the listed pairs over that of the top pairs. "Again" is the
share of a step's pairs that the step before had listed too. All leave out the first layers, which read everything. The
rest compares the next-token probabilities with those of the full cache.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press import ClusterRecall, PageRecall, RaggedCache, generate, get_press, load_model, prefill, question_ids
from kvzip_press import with_recall as recalling
from kvzip_press.attention.queries import queries_watched
from kvzip_press.cache.recall.policy import Recall
from kvzip_press.cache.recall.ranking import listed
from kvzip_press.cache.recall.recalled_pairs import RecalledPairs
from kvzip_press.leaderboard.benchmarks.following import samples_of
from kvzip_press.leaderboard.running.agreement import Agreement, log_probabilities
from kvzip_press.leaderboard.samples.task import Task
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.model.structure import AttentionLayer
from kvzip_press.terminal import plain

Queries = dict[int, torch.Tensor]  # layer -> [steps, num_attention_heads, 1, head_dim]


@dataclass
class Cell:
    """What one way of recalling did, over all contexts."""

    found: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    agreement: Agreement = field(default_factory=lambda: Agreement((), ()))
    group_bytes: list[float] = field(default_factory=list)


def ways(budget: int, cluster_sizes: Sequence[int]) -> dict[str, Recall]:
    """Returns what is compared at a budget, by name."""
    named: dict[str, Recall] = {}
    for size in cluster_sizes:
        named[f"clusters of {size}"] = ClusterRecall(budget=budget, cluster_size=size)
        named[f"clusters of {size}, each query head"] = ClusterRecall(
            budget=budget, cluster_size=size, per_query_head=True
        )
    named["pages of 16"] = PageRecall(budget=budget)
    named["pages of 16, each query head"] = PageRecall(budget=budget, per_query_head=True)
    return named


def main(
    contexts: Annotated[int, typer.Option(help="Contexts.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 2000,
    keys: Annotated[int, typer.Option(help="Facts, and questions, a context.")] = 4,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer that the full cache writes.")] = 12,
    budget: Annotated[list[int] | None, typer.Option(help="Pairs that a step reads; several.")] = None,
    cluster_size: Annotated[list[int] | None, typer.Option(help="Mean pairs of a cluster; several.")] = None,
    removed: Annotated[float, typer.Option(help="Fraction of pairs that KVzip removes before.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 41,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
) -> None:
    """Runs the comparison and prints it."""
    loaded, tokenizer = load_model(model)
    task: Task = get_task("hidden_facts", n_keys=keys)
    samples = samples_of(tokenizer, task, contexts, tokens, seed)
    cells: dict[tuple[int, str], Cell] = {}
    budgets = budget or [64, 128, 256, 512]
    for sample in track(samples, description="contexts", transient=True):
        asked = [list(question_ids(tokenizer, q.text, answer_prefix=q.answer_prefix)) for q in sample.questions]
        done = prefill(loaded, tokenizer, sample.context)
        full = done.evict(get_press("none").score(done))
        written = [generate(loaded, full.fork(), [ids], answer_tokens)[0] for ids in asked]
        expected, _ = observed(loaded, full, asked, written)
        kept = done.evict(get_press("kvzip", removed).score(done)) if removed else full
        before, queries = observed(loaded, kept, asked, written)
        if removed:
            kept_all = cells.setdefault((0, "all that KVzip kept"), Cell())
            kept_all.agreement += Agreement.of(expected, before)
        for one in budgets:
            for name, recall in ways(one, cluster_size or [80, 40]).items():
                cache = recalling(kept, recall)
                measure(loaded, cache, cells.setdefault((one, name), Cell()), queries, asked, written, expected)
    Console().print(_table(cells))
    removed_too = f", {removed:.0%} removed by KVzip before" if removed else ""
    asked_of = f"{contexts} contexts of {tokens} tokens, {keys} answers each{removed_too}"
    Console().print(plain(f"{model}, {asked_of}, seed {seed}; KL in nats"))


def measure(
    model: Any,
    cache: RaggedCache,
    cell: Cell,
    queries: Queries,
    asked: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    expected: torch.Tensor,
) -> None:
    """Adds to a cell what a cache that recalls does about one context."""
    for index, layer in cache.ragged_layers():
        if isinstance(layer.packed, RecalledPairs):
            for part, value in zip(
                (cell.found, cell.mass, cell.again), found_by(layer.packed, queries[index]), strict=True
            ):
                part.append(value)
            held = layer.packed.groups
            cell.group_bytes.append(sum(one.nbytes for one in held.tensors) / layer.packed.total)
    cell.agreement += Agreement.of(expected, log_probabilities(model, cache, asked, written))


@torch.no_grad()
def observed(
    model: Any, cache: RaggedCache, asked: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, Queries]:
    """Reads answers behind their questions; returns the log probabilities and the queries of steps of one token."""
    seen: dict[int, list[torch.Tensor]] = {}

    def look(layer: AttentionLayer, query: torch.Tensor, _: dict[str, Any]) -> None:
        if query.shape[2] == 1:
            seen.setdefault(layer.layer_idx, []).append(query)

    with queries_watched(model, look):
        said = log_probabilities(model, cache, asked, written)
    return said, {index: torch.cat(of_layer) for index, of_layer in seen.items()}


def found_by(packed: RecalledPairs, queries: torch.Tensor) -> tuple[float, float, float]:
    """Returns "found", "mass" and "again", see above.

    Args:
        packed: The pairs of one row.
        queries: ``[steps, num_attention_heads, 1, head_dim]``, two steps or more.
    """
    steps, heads = queries.shape[:2]
    kv_heads, recall = packed.num_heads, packed.recall
    rows = torch.zeros(steps, dtype=torch.int64, device=queries.device)
    index, bounds = listed(recall, packed.groups, queries, kv_heads, row_index=rows, width=packed.width)
    lists = bounds.diff()
    own = torch.arange(len(lists), device=lists.device).repeat_interleave(lists)
    is_listed = torch.zeros(len(lists), packed.total, dtype=torch.bool, device=lists.device)
    is_listed[own, index[: int(bounds[-1])].long()] = True
    is_listed = is_listed.unflatten(0, (steps, -1)).repeat_interleave(heads * steps // len(lists), 1)
    keys, _ = packed.storage.decode(packed)
    starts = packed.cu_seqlens.tolist()
    found, mass = [], []
    for head in range(heads):
        where = slice(*starts[head // (heads // kv_heads) :][:2])
        own_keys = keys[where].float()
        weights = (queries[:, head, 0].float() @ own_keys.mT * queries.shape[-1] ** -0.5).softmax(-1)
        top = weights.topk(min(recall.budget, len(own_keys)), dim=-1)
        chosen = is_listed[:, head, where]
        found.append(float(chosen.gather(1, top.indices).float().mean()))
        mass.append(float(((weights * chosen).sum(-1) / top.values.sum(-1)).mean()))
    again = (is_listed[1:] & is_listed[:-1]).sum() / is_listed[1:].sum()
    return statistics.mean(found), statistics.mean(mass), float(again)


def _table(cells: dict[tuple[int, str], Cell]) -> Table:
    names = "budget", "read by", "found", "mass", "again", "KL", "same tokens", "groups, bytes a pair"
    table = Table(*names)
    for (budget, name), cell in cells.items():
        of_lists = [f"{statistics.mean(one):.3f}" if one else "" for one in (cell.found, cell.mass, cell.again)]
        said = f"{cell.agreement.mean_kl:z.4f}", f"{cell.agreement.share:.3f}"
        group_bytes = f"{statistics.mean(cell.group_bytes):.1f}" if cell.group_bytes else ""
        table.add_row(str(budget) if budget else "", name, *of_lists, *said, group_bytes)
    return table


if __name__ == "__main__":
    typer.run(main)
