"""Runs a shard (or all) of a run into a directory, and merges the directories of shards."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError, RunDirectoryError
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.running.contexts import contexts_of
from kvzip_press.leaderboard.running.endpoint import Endpoint
from kvzip_press.leaderboard.running.plan import Run, Work
from kvzip_press.leaderboard.running.run_directory import HEADS, ROWS, RunDirectory, RunRecord, lines_of
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.model.structure import max_positions

logger = logging.getLogger(__name__)


def run_shard(
    run: Run,
    works: Sequence[Work],
    model: Any,
    tokenizer: Any,
    directory: RunDirectory,
    *,
    on_row: Callable[[Row], None] | None = None,
    endpoint: Endpoint | None = None,
) -> None:
    """Runs whatever the directory still lacks of some contexts; every row is written to disk as soon as it is known.

    Args:
        run: The run.
        works: Its contexts, or a shard of them (see `kvzip_press.leaderboard.running.plan.shard`).
        model: The model that ``run.model_name`` names.
        tokenizer: Its tokenizer.
        directory: The run's directory, already entered.
        on_row: Called with each row once it is on disk.
        endpoint: A server that answers; None for the model itself.

    Raises:
        InvalidArgumentError: A context does not fit the model, or a server cannot answer the run; raised before
            anything is run.
        BudgetMismatchError: A cache does not hold what was asked for.
        RunDirectoryError: A row cannot be written.
    """
    limit = max_positions(model)
    for work in works:
        contexts_of(work, run, tokenizer, limit)
    if endpoint is not None:
        endpoint.check(run, works)
    rows = execute(run, works, model, tokenizer, done=directory.done, on_heads=directory.write_heads, endpoint=endpoint)
    for row in rows:
        directory.write(row)
        if on_row is not None:
            on_row(row)


def merge(shards: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> RunRecord:
    """Joins the rows of several directories of one run; rows that are in more than one are taken once.

    Args:
        shards: The directories; they are not changed.
        output: The directory to create, or to add to if it is of the same run.

    Raises:
        InvalidArgumentError: No directories were given.
        RunDirectoryError: They are of different runs (the message names the first differing keys), hold rows of
            another run, or cannot be read.
    """
    if not shards:
        raise InvalidArgumentError("expected directories to merge, got none")
    records = [RunRecord.read(path) for path in shards]
    for path, record in zip(shards[1:], records[1:], strict=True):
        if differences := records[0].differences(record):
            raise RunDirectoryError(
                f"expected shards of one run, but {shards[0]} and {path} differ in {differences[0]}"
            )
    with RunDirectory(output, records[0]) as directory:
        for path in shards:
            for row in lines_of(Path(path) / ROWS, Row, records[0]):
                directory.write(row)
            for heads in lines_of(Path(path) / HEADS, HeadBudgets, records[0]):
                directory.write_heads(heads)
        if len(directory.done) < records[0].n_rows:
            logger.warning("%s: %d of the run's %d rows", output, len(directory.done), records[0].n_rows)
    return records[0]
