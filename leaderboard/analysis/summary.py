"""Pure functions from rows to cells, which tables show and pictures draw."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.checks import check_row
from kvzip_press.leaderboard.rows.results import KL, Row

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One press at one ratio. Sizes and times are means over contexts; those of answers are means over questions.

    A value that no row has is None (rows from other programs have no sizes and times).

    Attributes:
        run_id: The run that its rows come from.
        model: The model's name.
        query_aware: Whether the questions were known when the contexts were compressed.
        task: The task, None for all of them.
        press: Its label.
        compression_ratio: Fraction asked to be removed.
        n_contexts: Contexts behind the numbers.
        n_questions: Answers behind the numbers.
        accuracy: Mean over the tasks of the mean over contexts of the mean over questions.
        standard_error: Of the accuracy, from the spread between contexts, because questions about one context are not
            independent; None if a task has a single context.
        kept_fraction: Measured.
        resident_bytes: Of the compressed cache.
        compression: Bytes of the uncompressed caches over those of the compressed ones.
        prefill_seconds: The forward pass that all presses share.
        compress_seconds: Scoring and evicting.
        answer_seconds: Reading a question and writing its answer.
        ms_per_token: All answer seconds over all answer tokens, in milliseconds.
        kl: Mean KL divergence from the full cache's probabilities, in nats, of rows that follow it, whose accuracy is
            the share of next tokens that are the same; None of other rows.
    """

    run_id: str
    model: str
    query_aware: bool
    task: str | None
    press: str
    compression_ratio: float
    n_contexts: int
    n_questions: int
    accuracy: float
    standard_error: float | None
    kept_fraction: float | None
    resident_bytes: float | None
    compression: float | None
    prefill_seconds: float | None
    compress_seconds: float | None
    answer_seconds: float | None
    ms_per_token: float | None
    kl: float | None = None


class Table(tuple[Row, ...]):
    """Rows of which it is certain that they form one table (`one_table`)."""

    __slots__ = ()

    def where(self, keep: Callable[[Row], bool]) -> "Table":
        """Returns the rows that are to be kept; they form a table, too, and nothing is checked again."""
        return Table(filter(keep, self))


def split_tables(rows: Iterable[Row]) -> list[list[Row]]:
    """Splits rows into tables: one per run and model, with query-aware and query-agnostic rows apart.

    Rows that follow the full cache have a table of their own.

    Raises:
        InvalidArgumentError: A row has a value that no table can be made of, see `check_row`.
    """
    rows = list(rows)
    for row in rows:
        check_row(row)
    return split(rows, _table_of)


def one_table(rows: Iterable[Row]) -> Table:
    """Returns the rows, once it is certain that they form one table.

    Raises:
        InvalidArgumentError: They belong to several tables (see `split_tables`), a press answered the same question
            twice at the same ratio, or a task asked in several versions; or a row has a value that no table can be made
            of, see `check_row`.
    """
    if isinstance(rows, Table):
        return rows
    rows = Table(rows)
    for row in rows:
        check_row(row)
    if len(runs := {row.run_id for row in rows}) > 1:
        raise InvalidArgumentError(f"expected rows of one run, got {len(runs)}: {', '.join(sorted(runs))}")
    if len(tables := {_table_of(row) for row in rows}) > 1:
        raise InvalidArgumentError(
            "expected rows of one model, all query-aware or none, and all or none following the full cache, got "
            f"{sorted(tables)}"
        )
    seen: set[Hashable] = set()
    for row in rows:
        if (key := (row.press, row.compression_ratio, *context_key(row), row.question_id)) in seen:
            raise InvalidArgumentError(f"expected one row a press, ratio and question, got two of {key}")
        seen.add(key)
    for task in split(rows, lambda row: row.task):
        if len(versions := {row.task_version for row in task}) > 1:
            found = " and ".join(sorted(str(version or "unknown") for version in versions))
            raise InvalidArgumentError(
                f"expected rows of one version of the task {task[0].task!r:.80}, got {found}: their scores cannot be "
                "compared. Show them apart, or run the older ones again"
            )
    return rows


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """Returns the cells of one table, presses in the order of their first row, ratios from small to large.

    Raises:
        InvalidArgumentError: The rows are of several tables, or some are repeated; see `one_table`.
    """
    rows = one_table(rows)
    order = {press: place for place, press in enumerate(dict.fromkeys(row.press for row in rows))}

    def place(row: Row) -> tuple[int, float]:
        return order[row.press], row.compression_ratio

    return [_cell(list(group), None) for _, group in groupby(sorted(rows, key=place), key=place)]


def summarise_tasks(rows: Iterable[Row]) -> list[Cell]:
    """Returns the cells of each task alone, tasks in the order of their first rows. Raises as `summarise` does."""
    tasks = split(one_table(rows), lambda row: row.task)
    presses = dict.fromkeys(row.press for task in tasks for row in task)
    return [
        _cell(group, task[0].task)
        for task in tasks
        for group in sorted(
            split(task, lambda row: (row.press, row.compression_ratio)),
            key=lambda group: (list(presses).index(group[0].press), group[0].compression_ratio),
        )
    ]


def find_full(items: Iterable[Row] | Iterable[Cell]) -> str | None:
    """Returns the label of the full cache: the first press that only has ratio 0. None if there is none."""
    ratios: dict[str, set[float]] = {}
    for item in items:
        ratios.setdefault(item.press, set()).add(item.compression_ratio)
    return next((press for press, found in ratios.items() if found == {0.0}), None)


def context_key(row: Row) -> tuple[str, int, str]:
    """Identifies a row's context: questions about one context are not independent, and presses share contexts."""
    return row.task, row.seed, row.sample_id


def stratified_mean(tasks: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Returns the mean over tasks of the mean over contexts, and its standard error.

    The error treats tasks as independent, each with the variance of its contexts' mean: clustered by context. None if
    a task has a single context.

    Args:
        tasks: For each task, one number per context.
    """
    variances = [statistics.variance(task) / len(task) if len(task) > 1 else math.nan for task in tasks]
    error = math.sqrt(sum(variances)) / len(variances)
    return statistics.fmean(statistics.fmean(task) for task in tasks), None if math.isnan(error) else error


def split(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Groups the items by key, in the order of each key's first item."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _table_of(row: Row) -> tuple[str, str, bool, bool]:
    return row.run_id, row.model, row.query_aware, row.follows_full_cache


def _cell(rows: Sequence[Row], task: str | None) -> Cell:
    contexts = split(rows, context_key)
    tasks = split(contexts, lambda context: context[0].task)
    accuracy, standard_error = stratified_mean(
        [[statistics.fmean(row.score for row in context) for context in contexts] for contexts in tasks]
    )
    heads = [context[0] for context in contexts]  # values that belong to a whole context are the same in all its rows
    return Cell(
        run_id=rows[0].run_id,
        model=rows[0].model,
        query_aware=rows[0].query_aware,
        task=task,
        press=rows[0].press,
        compression_ratio=rows[0].compression_ratio,
        n_contexts=len(contexts),
        n_questions=len(rows),
        accuracy=accuracy,
        standard_error=standard_error,
        kept_fraction=mean_of_known(row.kept_fraction for row in heads),
        resident_bytes=mean_of_known(row.resident_bytes for row in heads),
        compression=_compression(heads),
        prefill_seconds=mean_of_known(row.prefill_seconds for row in heads),
        compress_seconds=mean_of_known(_sum(row.score_seconds, row.evict_seconds) for row in heads),
        answer_seconds=mean_of_known(row.answer_seconds for row in rows),
        ms_per_token=ms_per_token(rows),
        kl=_kl(tasks),
    )


def _kl(tasks: Sequence[Sequence[Sequence[Row]]]) -> float | None:
    if not tasks[0][0][0].follows_full_cache:
        return None
    found, _ = stratified_mean(
        [[statistics.fmean(float(row.tags[KL]) for row in context) for context in contexts] for contexts in tasks]
    )
    return found


def _compression(rows: Sequence[Row]) -> float | None:
    known = [(row.dense_bytes, row.resident_bytes) for row in rows if row.dense_bytes and row.resident_bytes]
    return sum(dense for dense, _ in known) / sum(resident for _, resident in known) if known else None


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def ms_per_token(rows: Sequence[Row]) -> float | None:
    """Returns all answer seconds over all answer tokens, in milliseconds; None if no row has both."""
    known = [(row.answer_seconds, row.n_answer_tokens) for row in rows]
    seconds = sum(seconds for seconds, tokens in known if seconds is not None and tokens is not None)
    tokens = sum(tokens for seconds, tokens in known if seconds is not None and tokens is not None)
    return 1000 * seconds / tokens if tokens else None
