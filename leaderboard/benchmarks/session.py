"""Measures a running batch: many users on one context and on a context each, in steps with and without CUDA graphs.

``python -m kvzip_press.leaderboard.benchmarks.session --shape llama3.1-8b --users 64 --tokens 32768 --removed 0.7``

Weights and contexts are random, since time does not depend on their values, and the contexts of several users are
copies of one. All users ask at once, and every answer has the same length. Beside the session, in the same run,
``generate`` answers one user after another; the ways take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import eq
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press.attention.implementation import attach
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.answering import question_ids
from kvzip_press.decoding.generation import MIN_GRAPH_TOKENS, generate
from kvzip_press.leaderboard.benchmarks.many_contexts import random_contexts
from kvzip_press.leaderboard.benchmarks.periods import measured_model
from kvzip_press.model.devices import get_device, timed
from kvzip_press.serving.context import PoolShape
from kvzip_press.serving.packing import pairs_in_cache
from kvzip_press.serving.session import Session
from kvzip_press.terminal import plain
from kvzip_press.testing import ByteTokenizer

WARMUP_TOKENS = MIN_GRAPH_TOKENS  # so that `generate` captures, too
ONE_BY_ONE = "generate, one by one"
#: Name -> whether its session captures steps.
WAYS: dict[str, bool | None] = {ONE_BY_ONE: None, "session, eager steps": False, "session, captured steps": None}


@dataclass(frozen=True)
class Load:
    """What users do.

    Attributes:
        users: Requests at a time.
        question: Tokens of a question, about.
        answer: Tokens of an answer.
    """

    users: int = 64
    question: int = 64
    answer: int = 256

    @property
    def questions(self) -> list[str]:
        """A question of each user."""
        return [f"{user} ".ljust(self.question, "?") for user in range(self.users)]


@dataclass(frozen=True)
class Measured:
    """A way to answer all users.

    Attributes:
        way: Which one.
        contexts: How many contexts they ask about.
        tokens_per_second: Tokens of answers a second, questions included, of each repetition.
        same: Answers that are those of ``generate``, of the last repetition.
        note: Why steps were not captured, where they should have been.
    """

    way: str
    contexts: int
    tokens_per_second: list[float]
    same: int
    note: str | None


class _Endless(ByteTokenizer):
    """A tokenizer without an end token, so that answers have the length that is asked for."""

    eos_token_id = None  # type: ignore[assignment]


Ids = list[list[int]]  # an answer of each user


def main(
    shape: Annotated[str | None, typer.Option(help="Random weights of this published shape.")] = "llama3.1-8b",
    model: Annotated[str | None, typer.Option(help="A model by its name, or smollm2, instead of a shape.")] = None,
    users: Annotated[int, typer.Option(help="Requests at a time.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of a context.")] = 32768,
    removed: Annotated[float, typer.Option(help="Fraction of pairs removed.")] = 0.7,
    storage: Annotated[str, typer.Option(help="Storage of contexts and pool: model or int8.")] = "model",
    question: Annotated[int, typer.Option(help="Tokens of a question, about.")] = 64,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    repeats: Annotated[int, typer.Option(help="Repetitions, of which median, least and most are shown.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the measurements and prints them."""
    place, load = get_device(device), Load(users, question, answer)
    loaded = measured_model(None if model is not None else shape, model, place)
    loaded.generation_config.eos_token_id = None
    attach(loaded)
    cache = random_contexts(loaded, tokens, removed, 1, storage)
    rows = [one for n in sorted({1, users}) for one in measured(loaded, cache, load, storage, n, repeats)]
    table = Table("way", "contexts", "tokens/s", "least", "most", "as generate", box=None, pad_edge=False)
    for row in rows:
        figures = statistics.median(row.tokens_per_second), min(row.tokens_per_second), max(row.tokens_per_second)
        same = f"{row.same} of {users}"
        table.add_row(plain(row.way), str(row.contexts), *(f"{figure:.1f}" for figure in figures), same)
    Console().print(table)
    for note in sorted({row.note for row in rows if row.note is not None}):
        Console().print(plain(f"steps were not captured: {note}"), soft_wrap=True)
    if output is not None:
        card = torch.cuda.get_device_name() if place.type == "cuda" else "CPU"
        said = {"model": model or shape, "device": card, "torch": torch.__version__, "storage": storage}
        made_by = {**said, "tokens": tokens, "removed": removed, **asdict(load)}
        output.write_text(json.dumps({**made_by, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def measured(model: Any, cache: RaggedCache, load: Load, storage: str, n_contexts: int, repeats: int) -> list[Measured]:
    """Measures all ways over so many contexts, in turns; a session at a time, since a pool may fill a GPU."""
    names = [f"context {user % n_contexts}" for user in range(load.users)]
    figures: dict[str, list[float]] = {way: [] for way in WAYS}
    answers: dict[str, Ids] = {}
    notes: dict[str, str | None] = {}
    for _ in range(repeats):
        for way, graph in WAYS.items():
            if way == ONE_BY_ONE:
                seconds, answers[way] = _timed(partial(_one_by_one, model, cache, load), load, model.device)
                notes[way] = None
            else:
                with _session(model, cache, load, storage, names, graph) as session:
                    seconds, answers[way] = _timed(partial(_asked, session, load, names), load, model.device)
                    notes[way] = session.reason if graph is None else None
            figures[way].append(load.users * load.answer / seconds)
    expected = answers[ONE_BY_ONE]
    same = {way: sum(map(eq, answers[way], expected)) for way in WAYS}
    return [Measured(way, n_contexts, figures[way], same[way], notes[way]) for way in WAYS]


def _session(
    model: Any, cache: RaggedCache, load: Load, storage: str, names: Sequence[str], graph: bool | None
) -> Session:
    """Returns a session with a copy of the context under each name, and no more room than that takes."""
    tokenizer, known = _Endless(), sorted(set(names))
    room = len(known) * pairs_in_cache(cache) * PoolShape.of(model, storage).pair_bytes
    longest = max(len(question_ids(tokenizer, text)) for text in load.questions) + load.answer
    options: dict[str, Any] = {"storage": storage, "max_rows": load.users, "max_tokens": longest, "graph": graph}
    session = Session(model, tokenizer, pool_bytes=room, **options)
    for name in known:
        session.add(name, cache)
    return session


def _asked(session: Session, load: Load, names: Sequence[str], n_tokens: int) -> Ids:
    """Returns the answers to all users, who ask at once."""
    asked = zip(load.questions, names, strict=True)
    streams = [session.submit(text, name, max_new_tokens=n_tokens) for text, name in asked]
    while session.step():
        pass
    return [stream.ids for stream in streams]


def _one_by_one(model: Any, cache: RaggedCache, load: Load, n_tokens: int) -> Ids:
    """Returns the answers to all users, one after another; the cache is the same for each, which takes as long."""
    questions = (question_ids(_Endless(), text) for text in load.questions)
    return [generate(model, cache.fork(), ids, n_tokens)[0] for ids in questions]


def _timed(answer: Callable[[int], Ids], load: Load, device: torch.device) -> tuple[float, Ids]:
    """Returns the seconds of all answers, and the answers, after shorter ones that compile and capture what is used."""
    answer(WARMUP_TOKENS)
    answers, seconds = timed(device, answer, load.answer)
    assert all(len(ids) == load.answer for ids in answers), "every answer has its length"
    return seconds, answers


if __name__ == "__main__":
    typer.run(main)
