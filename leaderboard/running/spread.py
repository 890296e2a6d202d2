"""Spreads a run over workers: each holds the model, contexts are handed to whoever is idle, and one process writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvzip_press.errors import WorkerError
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row, RowKey
from kvzip_press.leaderboard.running.contexts import contexts_of
from kvzip_press.leaderboard.running.plan import Run, count_rows, plan, shard
from kvzip_press.leaderboard.running.run_directory import RunDirectory, RunRecord
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.model.structure import max_positions

Load = Callable[[], tuple[Any, Any]]
Found = tuple[list[Row], list[HeadBudgets]]
Described = tuple[RunRecord, "list[Group]", int]

MOST_LOSSES = 3  # the run fails when this many workers have died over the same contexts


@dataclass(frozen=True)
class Group:
    """Contexts of one task that are read together: their indices in the run's list, and their names."""

    places: tuple[int, ...]
    samples: frozenset[tuple[str, str]]


class Worker:
    """One process, with the model and the run's list of contexts; every worker makes the same list."""

    def __init__(self, run: Run, load: Load) -> None:
        self.run = run
        self.model, self.tokenizer = load()
        self.works = plan(run, self.tokenizer)

    def describe(self, shard_of: tuple[int, int], n_workers: int) -> Described:
        """Returns the run's record, the groups of a shard, and how many rows these have."""
        limit = max_positions(self.model)
        places = shard(range(len(self.works)), *shard_of)
        for place in places:
            contexts_of(self.works[place], self.run, self.tokenizer, limit)  # raises if one does not fit
        record = RunRecord.of(self.run, self.model, count_rows(self.run, self.works))
        return (
            record,
            list(self._groups(places, n_workers)),
            count_rows(self.run, [self.works[place] for place in places]),
        )

    def rows(self, group: Group, done: Collection[RowKey]) -> Found:
        """Returns the missing rows of a group, and what its heads kept."""
        heads: list[HeadBudgets] = []
        works = [self.works[place] for place in group.places]
        rows = execute(self.run, works, self.model, self.tokenizer, done=done, on_heads=heads.append)
        return list(rows), heads

    def _groups(self, places: Sequence[int], n_workers: int) -> Iterator[Group]:
        of_task: dict[str, list[int]] = {}
        for place in places:
            of_task.setdefault(self.works[place].task.name, []).append(place)
        # Smaller than the run's batches if some workers would have nothing to do, or much less than others.
        size = max(min(self.run.batch_size, len(places) // (2 * n_workers)), 1)
        parts = [same[start : start + size] for same in of_task.values() for start in range(0, len(same), size)]
        for part in sorted(parts):
            works = [self.works[place] for place in part]
            yield Group(tuple(part), frozenset((work.task.name, work.sample.sample_id) for work in works))


class WorkerDiedError(WorkerError):
    """A worker's process is gone, and with it what it was doing."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


class Workers(Protocol):
    """Processes that each hold a :class:`Worker`, by number. An executor is one class of this form."""

    count: int

    def start(self, number: int) -> None:
        """Begins to load worker ``number``, in place of the one that had this number."""

    def ask(self, number: int, method: str, *arguments: Any) -> None:
        """Has a worker call one of its methods; :meth:`wait` returns the result."""

    def wait(self) -> tuple[int, Any]:
        """Waits for any result, and returns it with the worker's number.

        Raises:
            WorkerDiedError: A worker that was asked is gone.
            Exception: Whatever its method, or loading the model, has raised.
        """


def spread(
    workers: Workers,
    output: str | os.PathLike[str],
    *,
    shard_of: tuple[int, int] = (0, 1),
    force: bool = False,
    on_begin: Callable[[int], Callable[[Row], None]] | None = None,
) -> None:
    """Runs whatever a directory still lacks of a run; the rows equal those of a serial run.

    Args:
        workers: The workers, none of which was started.
        output: The run's directory, on this machine; workers write nothing.
        shard_of: ``(index, count)``: only every count-th context, beginning with ``index``.
        force: Whether to begin again; existing files are kept under other names.
        on_begin: Called with the number of missing rows; returns a function that is called with each row once that is
            on disk.

    Raises:
        WorkerError: Workers keep dying over the same contexts, or the first one before it had any.
        KVzipPressError: Whatever a worker or `RunDirectory` raises.
    """
    for number in range(workers.count):
        workers.start(number)
    workers.ask(0, "describe", shard_of, workers.count)
    try:
        _, (record, groups, n_rows) = workers.wait()
    except WorkerDiedError as error:
        raise WorkerError(f"expected a worker that loads the model, but it died: {error}") from error
    with RunDirectory(output, record, force=force) as directory:
        samples = frozenset[tuple[str, str]]().union(*(group.samples for group in groups))
        missing = n_rows - sum((key.task, key.sample_id) in samples for key in directory.done)
        on_row = None if on_begin is None else on_begin(missing)
        for rows, heads in _Contexts(workers, frozenset(directory.done), groups).found():
            for line in heads:
                directory.write_heads(line)
            for row in rows:
                directory.write(row)
                if on_row is not None:
                    on_row(row)


@dataclass
class _Contexts:
    """The contexts that wait, and which worker has which. Those of a worker that dies are done again in full."""

    workers: Workers
    done: Collection[RowKey]
    waiting: list[Group]
    at: dict[int, Group] = field(default_factory=dict)
    losses: dict[Group, int] = field(default_factory=dict)

    def found(self) -> Iterator[Found]:
        """Yields the rows of groups as they are done.

        Raises:
            WorkerError: Workers keep dying over the same contexts.
        """
        for number in range(self.workers.count):
            self._give(number)
        while self.at:
            try:
                number, found = self.workers.wait()
            except WorkerDiedError as error:
                self._lost(error)
                continue
            del self.at[number]
            self._give(number)
            yield found

    def _give(self, number: int) -> None:
        """Gives the next contexts to an idle worker."""
        if self.waiting:
            group = self.at[number] = self.waiting.pop(0)
            done = {key for key in self.done if (key.task, key.sample_id) in group.samples}
            self.workers.ask(number, "rows", group, done)

    def _lost(self, error: WorkerDiedError) -> None:
        group = self.at.pop(error.number)
        losses = self.losses[group] = self.losses.get(group, 0) + 1
        names = ", ".join("/".join(sample) for sample in sorted(group.samples))
        if losses == MOST_LOSSES:
            raise WorkerError(f"expected workers to live, but {losses} died over {names}: {error}") from error
        logging.getLogger(__name__).warning("a worker died; its contexts are done again: %s", names)
        self.waiting.insert(0, group)
        self.workers.start(error.number)
        self._give(error.number)
