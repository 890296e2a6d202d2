"""A few questions with every press's answer: those that tell the presses apart most."""

from collections.abc import Sequence
from typing import Any

from kvzip_press.leaderboard.analysis.summary import context_key, split
from kvzip_press.leaderboard.rows.results import Row

N_EXAMPLES = 24
_MAX_CHARACTERS = 300


def examples(rows: Sequence[Row], n: int = N_EXAMPLES) -> list[dict[str, Any]]:
    """Returns up to `n` questions whose scores differ most between presses, equally many per task; ties by order."""
    tasks = [split(task, lambda row: (context_key(row), row.question_id)) for task in split(rows, lambda row: row.task)]
    each = -(-n // max(1, len(tasks)))
    chosen = [question for task in tasks for question in sorted(task, key=lambda found: -_spread(found))[:each]]
    return [_example(question) for question in chosen[:n]]


def _spread(question: Sequence[Row]) -> float:
    """The variance of the scores, times their number."""
    mean = sum(row.score for row in question) / len(question)
    return sum((row.score - mean) ** 2 for row in question)


def _example(question: Sequence[Row]) -> dict[str, Any]:
    first = question[0]
    return {
        "task": first.task,
        "sample_id": first.sample_id,
        "question_id": first.question_id,
        "question": _cut(first.question),
        "references": [_cut(reference) for reference in first.references[:5]],
        "answers": [[row.press, row.compression_ratio, row.score, _cut(row.prediction)] for row in question],
    }


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
