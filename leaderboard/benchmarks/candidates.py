"""Compares candidates for a better score than KVzip's on the same questions, all from one replay of each context.

``python -m kvzip_press.leaderboard.benchmarks.candidates measure --grid weighting-qwen05 --seed 2028 --shard 0/8
--rows rows/2028-0.jsonl`` answers a grid's questions (its tasks, its ratios; its presses do not matter) under each
candidate; shards may run side by side. ``... candidates compare rows/*.jsonl --choose 2028 --confirm 2029`` then prints
the differences from KVzip on the first seed, chooses the best candidate there, and prints it alone on the second, whose
contexts it has not seen: one comparison a ratio, so that its p-values are what they say.

With ``--along`` a candidate does not write an answer of its own, but reads the full cache's, in one forward instead of
one a token. The score is 1 where the full cache is right and each of its tokens would be the candidate's too; rows also
have the divergence from the full cache's probabilities, which tells candidates apart long before answers do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press import compat, get_press, prefill, question_ids
from kvzip_press.attention.implementation import attach
from kvzip_press.decoding.answering import answer_ids, decoded
from kvzip_press.errors import InvalidArgumentError, did_you_mean
from kvzip_press.leaderboard.analysis.statistics import Comparison, compare
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.benchmarks.candidate_scores import CANDIDATES, KVZIP, candidate_scores
from kvzip_press.leaderboard.progress import row_bar
from kvzip_press.leaderboard.rows.results import Row, RowWriter, read_rows
from kvzip_press.leaderboard.running.contexts import Context, contexts_of
from kvzip_press.leaderboard.running.grid import load_grid
from kvzip_press.leaderboard.running.plan import Run, plan, shard
from kvzip_press.leaderboard.samples.task import version_of
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import max_positions
from kvzip_press.terminal import plain

app = typer.Typer(add_completion=False, help=__doc__)

GAINED, KEPT = 0.8, 0.7
"""Candidates should gain at ratios from the first on, and lose nothing up to the second."""
MAY_LOSE = 0.01
FULL = "full cache"


@app.command("measure")
def measure(
    grid: Annotated[str, typer.Option(help="A grid, whose model, tasks and ratios are taken.")] = "weighting-smollm2",
    rows: Annotated[
        Path, typer.Option(help="Where rows go; those of a file that is there stay, and are not made again.")
    ] = Path("outputs/candidates/rows.jsonl"),
    seed: Annotated[int | None, typer.Option(help="Seed of the contexts; default the grid's.")] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help="Name of a candidate; several times. Default: all.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only tasks of these names; several times.")] = None,
    removed: Annotated[
        list[float] | None, typer.Option(help="Fraction removed; several times. Default the grid's.")
    ] = None,
    contexts: Annotated[int | None, typer.Option(help="Contexts a task; default the grid's.")] = None,
    replay: Annotated[str, typer.Option(help="full or local.")] = "full",
    along: Annotated[bool, typer.Option(help="Read the full cache's answers instead of writing own ones.")] = False,
    shard_of: Annotated[str, typer.Option("--shard", help="I/N: only contexts I, I+N ...")] = "0/1",
    model: Annotated[str | None, typer.Option(help="Path or hub id of a model; default the grid's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default the grid's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Answers the questions of a grid under each candidate and with the full cache."""
    names = list(dict.fromkeys((KVZIP, *(candidate or CANDIDATES))))
    for name in names:
        if name not in CANDIDATES:
            raise typer.BadParameter(f"expected a candidate, got {name!r}{did_you_mean(name, CANDIDATES)}")
    run = _run(load_grid(grid).run, seed, task, removed, contexts, dtype)
    index, _, count = shard_of.partition("/")
    loaded, tokenizer = load_on(run.model_name if model is None else model, device, run.dtype)
    works = shard(plan(run, tokenizer), int(index), int(count))
    limit = max_positions(loaded)
    found = [context for work in works for context in contexts_of(work, run, tokenizer, limit)]
    done = {row.key for row in read_rows(rows)} if rows.exists() else set()
    n_rows = sum(len(context.questions) for context in found) * (1 + len(names) * len(run.compression_ratios))
    with RowWriter(rows) as writer, row_bar(Console(), n_rows) as on_row:
        for context in found:
            for row in _rows(run, context, loaded, tokenizer, names, replay, done, along=along):
                writer.write(row)
                on_row(row)


def _run(
    run: Run,
    seed: int | None,
    tasks: Sequence[str] | None,
    removed: Sequence[float] | None,
    contexts: int | None,
    dtype: str | None,
) -> Run:
    """Returns a grid's run with what the command asks for instead."""
    specs = [spec for spec in run.tasks if not tasks or spec.task.name in tasks]
    if not specs:
        raise typer.BadParameter(f"expected tasks out of {[spec.task.name for spec in run.tasks]}, got {tasks}")
    return replace(
        run,
        tasks=tuple(spec if contexts is None else replace(spec, n_contexts=contexts) for spec in specs),
        seed=run.seed if seed is None else seed,
        compression_ratios=tuple(removed or run.compression_ratios),
        dtype=dtype or run.dtype,
        presses=(),
    )


def _rows(
    run: Run,
    context: Context,
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    replay: str,
    done: set[Any],
    *,
    along: bool,
) -> Iterator[Row]:
    """Yields the missing rows of a context: of the full cache, then candidate by candidate."""
    cells = [(FULL, 0.0), *((name, ratio) for name in names for ratio in run.compression_ratios)]
    cells = [cell for cell in cells if not _keys(context, *cell) <= done]
    if not cells:
        return
    read = prefill(model, tokenizer, [list(context.ids)], observers=[get_press("kvzip", weighting="surprisal")])
    scores = candidate_scores(read, [name for name in names if any(name == cell[0] for cell in cells)], replay=replay)
    scores[FULL] = get_press("none").score(read)
    answers = _Followed.of(model, tokenizer, read.evict(scores[FULL], 0.0), context) if along else None
    for name, ratio in cells:
        cache = read.evict(scores[name], ratio)
        kept = cache.kept_fraction
        if answers is not None:
            said, tags = answers.under(cache)
        else:
            said, tags = _written(model, tokenizer, cache, context), [{}] * len(context.questions)
        for number, ids in enumerate(said):
            yield _row(run, context, number, name, ratio, kept, decoded(tokenizer, ids), tags[number])


def _written(model: Any, tokenizer: Any, cache: Any, context: Context) -> list[list[int]]:
    prefixes = [question.answer_prefix for question in context.questions]
    bounds = [question.max_new_tokens for question in context.questions]
    return answer_ids(model, tokenizer, cache, context.texts, prefixes, bounds)


@dataclass(frozen=True)
class _Followed:
    """The full cache's answers to the questions of a context, up to the token with which they are right."""

    model: Any
    asked: list[list[int]]
    written: list[list[int]]
    right: list[bool]
    expected: list[torch.Tensor]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, full: Any, context: Context) -> _Followed:
        written, right = [], []
        for ids, question in zip(_written(model, tokenizer, full, context), context.questions, strict=True):
            scored = (context.work.task.score(decoded(tokenizer, ids[:n]), question) for n in range(1, len(ids) + 1))
            n_right = next((n for n, score in enumerate(scored, 1) if score == 1), None)
            right.append(n_right is not None)
            written.append(ids[:n_right] or [0])
        texts = zip(context.texts, context.questions, strict=True)
        asked = [list(question_ids(tokenizer, text, answer_prefix=one.answer_prefix)) for text, one in texts]
        return cls(model, asked, written, right, _log_probabilities(model, full, asked, written))

    def under(self, cache: Any) -> tuple[list[list[int]], list[dict[str, float | str]]]:
        """Returns what a cache makes of the answers: the same if they are right and its own; and tags for the rows."""
        found = _log_probabilities(self.model, cache, self.asked, self.written)
        said: list[list[int]] = []
        tags: list[dict[str, float | str]] = []
        for ids, right, expected, got in zip(self.written, self.right, self.expected, found, strict=True):
            same = bool((got.argmax(dim=-1) == torch.tensor(ids, device=got.device)).all())
            said.append(ids if right and same else [])
            tags.append({"divergence": float((expected.exp() * (expected - got)).sum(dim=-1).mean())})
        return said, tags


@torch.no_grad()
def _log_probabilities(
    model: Any, cache: Any, asked: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Returns what a cache expects of the tokens of each answer, fp32 ``[tokens, vocabulary]``, in one forward."""
    attach(model)
    rows = cache.fork()
    rows.batch_repeat_interleave(len(asked))
    ids = [[*question, *answer] for question, answer in zip(asked, written, strict=True)]
    width, start, device = max(map(len, ids)), cache.get_seq_length(), input_device(model)
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=device)  # on the right: unseen
    positions = torch.arange(start, start + width, device=device).expand(len(ids), -1)
    first = min(map(len, asked)) - 1
    logits = model(
        input_ids=padded,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=width - first,
        **compat.cache_argument(model, rows),
    ).logits
    starts = [len(question) - 1 - first for question in asked]
    parts = [logits[i, begin : begin + len(written[i])] for i, begin in enumerate(starts)]
    return [part.float().log_softmax(dim=-1) for part in parts]


def _keys(context: Context, name: str, ratio: float) -> set[Any]:
    work = context.work
    return {
        (work.task.name, work.sample.sample_id, question.question_id, name, ratio, False)
        for question in context.questions
    }


def _row(
    run: Run,
    context: Context,
    number: int,
    name: str,
    ratio: float,
    kept: float,
    prediction: str,
    tags: Mapping[str, float | str],
) -> Row:
    question, work = context.questions[number], context.work
    return Row(
        run_id=run.run_id,
        task=work.task.name,
        model=run.model_name,
        press=name,
        compression_ratio=ratio,
        kept_fraction=kept,
        sample_id=work.sample.sample_id,
        question_id=question.question_id,
        seed=run.seed,
        prediction=prediction,
        references=question.references,
        score=work.task.score(prediction, question),
        query_aware=False,
        n_context_tokens=len(context.ids),
        n_answer_tokens=None,
        resident_bytes=None,
        dense_bytes=None,
        prefill_seconds=None,
        score_seconds=None,
        evict_seconds=None,
        answer_seconds=None,
        tags={**question.tags, **tags},
        task_version=version_of(work.task),
        question=question.text,
    )


@app.command("compare")
def compare_rows(
    files: Annotated[list[Path], typer.Argument(help="Files of rows, of any seeds and shards.")],
    choose: Annotated[int, typer.Option(help="The seed whose contexts choose the best candidate.")],
    confirm: Annotated[int | None, typer.Option(help="The seed that confirms it; none: only choose.")] = None,
) -> None:
    """Prints differences from KVzip, and what is left of the best candidate's on contexts that it was not chosen on."""
    if choose == confirm:
        raise typer.BadParameter(f"expected other contexts to confirm on than to choose on, got seed {choose} for both")
    every = [row for path in files for row in read_rows(path)]
    asked = {seed: [row for row in every if row.seed == seed] for seed in (choose, confirm) if seed is not None}
    for seed, rows in asked.items():
        if not rows:
            raise InvalidArgumentError(f"expected rows of seed {seed}, got those of {sorted({r.seed for r in every})}")
    found = differences(asked[choose])
    best = chosen(found)
    Console().print(_table(asked[choose], found, f"seed {choose}: all candidates"))
    Console().print(plain(f"best where it should gain, of those that lose nothing: {best or 'none'}"))
    if confirm is not None and best is not None:
        rows = [row for row in asked[confirm] if row.press in (KVZIP, best, FULL)]
        Console().print(_table(rows, differences(rows), f"seed {confirm}: the one that was chosen"))


def differences(rows: Sequence[Row]) -> list[Comparison]:
    """Returns the differences of candidates from KVzip on the same questions."""
    return [one for one in compare(rows, KVZIP) if one.press != FULL]


def chosen(found: Sequence[Comparison]) -> str | None:
    """Returns the candidate with the largest mean gain, of those that lose nothing elsewhere; None if none gains."""
    gains: dict[str, float] = {}
    for name in dict.fromkeys(one.press for one in found):
        of_ratio = {one.compression_ratio: one.difference for one in found if one.press == name}
        if all(difference >= -MAY_LOSE for ratio, difference in of_ratio.items() if ratio <= KEPT):
            gained = [difference for ratio, difference in of_ratio.items() if ratio >= GAINED]
            gains[name] = sum(gained) / len(gained) if gained else 0.0
    best = max(gains, key=lambda name: gains[name], default=None)
    return best if best is not None and gains[best] > 0 else None


def _table(rows: Sequence[Row], found: Sequence[Comparison], title: str) -> Table:
    """Returns a table of accuracies (KVzip) and of differences from them with standard errors and p-values."""
    ratios = sorted({one.compression_ratio for one in found})
    table = Table("candidate", *(f"{ratio:g} removed" for ratio in ratios), title=plain(title, "table.title"))
    means = {(cell.press, cell.compression_ratio): cell for cell in summarise(rows)}
    table.add_row(KVZIP, *(f"{means[KVZIP, ratio].accuracy:.3f}" for ratio in ratios))
    apart = divergences(rows)
    by_cell = {(one.press, one.compression_ratio): one for one in found}
    for name in dict.fromkeys(one.press for one in found):
        table.add_row(name, *(_shown(by_cell.get((name, ratio)), apart.get((name, ratio))) for ratio in ratios))
    n = len({(row.task, row.sample_id, row.question_id) for row in rows})
    full = means.get((FULL, 0.0))
    table.caption = (
        f"{n} questions; full cache {full.accuracy:.3f}; p of the sign-flip test, not adjusted" if full else ""
    )
    return table


def divergences(rows: Sequence[Row]) -> dict[tuple[str, float], float]:
    """Returns the divergence under each candidate and ratio in units of KVzip's, if rows have it.

    It is the geometric mean over contexts of that over the questions that both answered; below 1e-4 nats all is one.
    """
    logs: dict[tuple[str, float], dict[tuple[str, str], dict[str, float]]] = {}
    for row in rows:
        if isinstance(nats := row.tags.get("divergence"), float):
            of_context = logs.setdefault((row.press, row.compression_ratio), {})
            of_context.setdefault((row.task, row.sample_id), {})[row.question_id] = math.log(max(nats, 1e-4))
    found = {}
    for (name, ratio), contexts in logs.items():
        base = logs.get((KVZIP, ratio), {})
        apart = [
            [value - base[context][question] for question, value in asked.items() if question in base[context]]
            for context, asked in contexts.items()
            if context in base
        ]
        if means := [statistics.mean(values) for values in apart if values]:
            found[name, ratio] = math.exp(statistics.mean(means))
    return found


def _shown(one: Comparison | None, apart: float | None) -> str:
    if one is None:
        return ""
    interval = "" if one.interval is None else f" ({one.interval[0]:+z.3f} to {one.interval[1]:+z.3f})"
    times = "" if apart is None else f", {apart:.2f} x its divergence"
    return f"{one.difference:+z.3f}{interval} p {one.p_value:.3g}{times}"


if __name__ == "__main__":
    app()
