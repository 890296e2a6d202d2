"""The two maps: how much each head keeps, and at which depths and context lengths an answer is still found."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvzip_press.leaderboard.analysis.checks import check_heads
from kvzip_press.leaderboard.analysis.summary import split
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

N_DEPTHS = 10
_SAME_LENGTH = 1.25  # a column holds contexts up to this many times as long as its shortest


@dataclass(frozen=True)
class HeadMap:
    """The fraction that each head keeps under one press at one ratio.

    Attributes:
        press: The press's label.
        compression_ratio: Its ratio.
        n_contexts: How many contexts the means are taken over.
        layers: The layers that were compressed.
        kept: ``[layer][kv head]``, mean kept fraction.
    """

    press: str
    compression_ratio: float
    n_contexts: int
    layers: tuple[int, ...]
    kept: list[list[float]]


@dataclass(frozen=True)
class NeedleMap:
    """How often an answer is found, by its depth in the context and the context's length.

    Attributes:
        task: The task.
        press: The press's label.
        compression_ratio: Its ratio.
        lengths: Mean number of tokens of each column's contexts; all maps of a task have the same columns.
        scores: ``[tenth of the context][column]``, mean score; None where nothing was asked.
        counts: The questions behind each score.
    """

    task: str
    press: str
    compression_ratio: float
    lengths: list[int]
    scores: list[list[float | None]]
    counts: list[list[int]]

    @property
    def scores_by_depth(self) -> list[float | None]:
        """The mean score at each tenth of the context, over all lengths; None where nothing was asked."""
        return [
            sum((score or 0.0) * n for score, n in zip(scores, counts, strict=True)) / total
            if (total := sum(counts))
            else None
            for scores, counts in zip(self.scores, self.counts, strict=True)
        ]


def head_maps(heads: Iterable[HeadBudgets]) -> list[HeadMap]:
    """Returns the map of each press and ratio, in the order of their first lines; all lines are from one run.

    Raises:
        InvalidArgumentError: They have no fractions; see `check_heads`.
    """
    heads = list(heads)
    check_heads(heads)
    groups = split(heads, lambda budgets: (budgets.press, budgets.compression_ratio, _shape_of(budgets)))
    return [
        HeadMap(
            press=group[0].press,
            compression_ratio=group[0].compression_ratio,
            n_contexts=len(group),
            layers=group[0].layer_idx,
            kept=[np.mean(layer, axis=0).tolist() for layer in zip(*(budgets.kept for budgets in group), strict=True)],
        )
        for group in groups
    ]


def _shape_of(budgets: HeadBudgets) -> tuple[tuple[int, int], ...]:
    """Returns each layer with its number of heads, which layers need not have in common."""
    return tuple((layer, len(heads)) for layer, heads in zip(budgets.layer_idx, budgets.kept, strict=True))


def needle_maps(rows: Iterable[Row]) -> list[NeedleMap]:
    """Returns a map for each press and ratio of each task that records depths; all rows are from one table."""
    return [
        needle_map
        for task in split((row for row in rows if _place(row) is not None), lambda row: row.task)
        for needle_map in _maps_of_task(task)
    ]


def columns(lengths: Iterable[int]) -> list[int]:
    """Returns the shortest length of each cluster: lengths cluster around those that the run asked for."""
    starts: list[int] = []
    for length in sorted(lengths):
        if not starts or length > starts[-1] * _SAME_LENGTH:
            starts.append(length)
    return starts


def _maps_of_task(rows: Sequence[Row]) -> Iterator[NeedleMap]:
    lengths = [length for row in rows if (length := row.n_context_tokens) is not None]
    starts = columns(lengths)
    column_of = np.searchsorted(starts, lengths, side="right") - 1
    means = [round(float(np.mean(np.array(lengths)[column_of == column]))) for column in range(len(starts))]
    for group in split(rows, lambda row: (row.press, row.compression_ratio)):
        total, count = np.zeros((2, N_DEPTHS, len(starts)))
        for row in group:
            depth, length = _place(row) or (0.0, 0)
            place = min(int(depth * N_DEPTHS), N_DEPTHS - 1), int(np.searchsorted(starts, length, side="right")) - 1
            total[place] += row.score
            count[place] += 1
        scores = np.where(count > 0, total / np.maximum(count, 1), np.nan).tolist()
        yield NeedleMap(
            task=rows[0].task,
            press=group[0].press,
            compression_ratio=group[0].compression_ratio,
            lengths=means,
            scores=[[None if score != score else score for score in line] for line in scores],  # noqa: PLR0124  # NaN
            counts=count.astype(int).tolist(),
        )


def _place(row: Row) -> tuple[float, int] | None:
    """Returns the needle's depth, in [0, 1], and the context's number of tokens; None if the row lacks either."""
    depth = row.tags.get("depth")
    if not isinstance(depth, int | float) or not 0 <= depth <= 1 or row.n_context_tokens is None:
        return None
    return depth, row.n_context_tokens
