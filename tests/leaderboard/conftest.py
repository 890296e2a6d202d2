"""Rows and runs that the leaderboard's tests share."""

from collections.abc import Callable
from typing import Any

import pytest

from kvzip_press.leaderboard.results import Row

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
