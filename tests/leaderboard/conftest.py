"""Rows and runs that the leaderboard's tests share."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

_DEFAULTS: dict[str, Any] = {
    "run_id": "0123456789ab",
    "task": "hidden_facts",
    "model": "tiny",
    "press": "KVzip",
    "compression_ratio": 0.7,
    "kept_fraction": 0.33,
    "sample_id": "0000",
    "question_id": "Vera",
    "seed": 0,
    "prediction": "407.",
    "references": ("407",),
    "score": 1.0,
    "query_aware": False,
    "n_context_tokens": 450,
    "n_answer_tokens": 2,
    "resident_bytes": 7_000_000,
    "dense_bytes": 21_000_000,
    "prefill_seconds": 1.5,
    "score_seconds": 2.0,
    "evict_seconds": 0.25,
    "answer_seconds": 0.2,
    "provenance": {"torch": "2"},
}


def _row(**values: Any) -> Row:
    return Row(**{**_DEFAULTS, **values})


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A row; arguments replace fields."""
    return _row


_KEPT_POWER = {"full cache": 0.0, "KVzip": 0.2, "SnapKV": 0.8, "random": 2.0}  # how fast a press loses accuracy


@pytest.fixture
def make_table() -> Callable[..., list[Row]]:
    """The rows of a whole table, always the same: four presses that differ, contexts of two lengths."""

    def make(
        n_contexts: int = 8, *, n_questions: int = 2, tasks: tuple[str, ...] = ("niah", "profile_qa"), **values: Any
    ) -> list[Row]:
        rng = random.Random(0)
        return [
            _row(
                task=task,
                press=press,
                compression_ratio=ratio,
                kept_fraction=1 - ratio,
                sample_id=f"{context:04}",
                question_id=f"q{question}",
                score=float(rng.random() < 0.95 * (1 - ratio) ** power),
                n_context_tokens=500 * (1 + context % 2) + context,
                resident_bytes=round(21_000_000 * (1 - ratio)),
                answer_seconds=0.1 + 0.2 * (1 - ratio),
                tags={"depth": (question + 0.5) / n_questions} if task == "niah" else {},
                **values,
            )
            for task in tasks
            for context in range(n_contexts)
            for press, power in _KEPT_POWER.items()
            for ratio in ((0.0,) if press == "full cache" else (0.5, 0.75, 0.9375))
            for question in range(n_questions)
        ]

    return make


@pytest.fixture
def make_heads() -> Callable[..., list[HeadBudgets]]:
    """What heads kept in two contexts of the rows of `make_table`: 4 layers, the first of which is not compressed."""

    def make(run_id: str = _DEFAULTS["run_id"]) -> list[HeadBudgets]:
        return [
            HeadBudgets(
                run_id=run_id,
                task="niah",
                sample_id=f"{context:04}",
                press=press,
                compression_ratio=ratio,
                layer_idx=(1, 2, 3),
                kept=tuple((1 - ratio, min(1.0, 0.1 * layer + 0.2 * context)) for layer in (1, 2, 3)),
            )
            for context in range(2)
            for press in ("KVzip", "SnapKV")
            for ratio in (0.5, 0.75)
        ]

    return make
