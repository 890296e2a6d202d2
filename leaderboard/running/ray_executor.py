"""Runs on several GPUs or machines: Ray hands contexts to workers, and one process writes all rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, WorkerError, install_command
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row, RowKey
from kvzip_press.leaderboard.running.contexts import contexts_of
from kvzip_press.leaderboard.running.plan import Run, count_rows, plan, shard
from kvzip_press.leaderboard.running.run_directory import RunDirectory, RunRecord
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.model.structure import max_positions

Load = Callable[[], tuple[Any, Any]]
Found = tuple[list[Row], list[HeadBudgets]]

MOST_LOSSES = 3  # the run fails when this many workers have died over the same contexts


@dataclass(frozen=True)
class Cluster:
    """Where a run is spread.

    Attributes:
        workers: Number of processes, each of which holds the model.
        address: Address of a Ray cluster; None for one on this machine, which ends with the run.
        gpus_each: GPUs per worker, 0 on a CPU; a fraction lets workers share one.

    Raises:
        InvalidArgumentError: A number out of range.
    """

    workers: int
    address: str | None = None
    gpus_each: float = 1.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.gpus_each < 0:
            raise InvalidArgumentError(
                f"expected workers >= 1 and gpus_each >= 0, got {self.workers} and {self.gpus_each}"
            )


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

    def describe(self, shard_of: tuple[int, int]) -> tuple[RunRecord, list[Group], int]:
        """Returns the run's record, the groups of a shard, and how many rows these have."""
        limit = max_positions(self.model)
        places = shard(range(len(self.works)), *shard_of)
        for place in places:
            contexts_of(self.works[place], self.run, self.tokenizer, limit)  # raises if one does not fit
        record = RunRecord.of(self.run, self.model, count_rows(self.run, self.works))
        return record, list(self._groups(places)), count_rows(self.run, [self.works[place] for place in places])

    def rows(self, group: Group, done: Collection[RowKey]) -> Found:
        """Returns the missing rows of a group, and what its heads kept."""
        heads: list[HeadBudgets] = []
        works = [self.works[place] for place in group.places]
        rows = execute(self.run, works, self.model, self.tokenizer, done=done, on_heads=heads.append)
        return list(rows), heads

    def _groups(self, places: Sequence[int]) -> Iterator[Group]:
        of_task: dict[str, list[int]] = {}
        for place in places:
            of_task.setdefault(self.works[place].task.name, []).append(place)
        size = self.run.batch_size
        parts = [same[start : start + size] for same in of_task.values() for start in range(0, len(same), size)]
        for part in sorted(parts):
            works = [self.works[place] for place in part]
            yield Group(tuple(part), frozenset((work.task.name, work.sample.sample_id) for work in works))


@dataclass
class _Pool:
    """The workers and what each is doing. A worker that dies is replaced, and its contexts are done again in full."""

    ray: Any
    begin: Callable[[], Any]
    done: Collection[RowKey]
    waiting: list[Group]
    at: dict[Any, tuple[Any, Group]] = field(default_factory=dict)  # future of rows -> worker and contexts
    losses: dict[Group, int] = field(default_factory=dict)

    def give(self, worker: Any) -> None:
        """Gives the next contexts to an idle worker."""
        if self.waiting:
            group = self.waiting.pop(0)
            done = {key for key in self.done if (key.task, key.sample_id) in group.samples}
            self.at[worker.rows.remote(group, done)] = worker, group

    def take(self) -> Found:
        """Waits for the next finished rows and returns them; none if their worker died.

        Raises:
            WorkerError: Workers keep dying over the same contexts.
        """
        [first], _ = self.ray.wait(list(self.at), num_returns=1)
        worker, group = self.at.pop(first)
        try:
            found: Found = self.ray.get(first)
        except self.ray.exceptions.RayActorError as error:
            self._lost(group, error)
            return [], []
        self.give(worker)
        return found

    def _lost(self, group: Group, error: Exception) -> None:
        losses = self.losses[group] = self.losses.get(group, 0) + 1
        names = ", ".join("/".join(sample) for sample in sorted(group.samples))
        if losses == MOST_LOSSES:
            raise WorkerError(f"expected workers to live, but {losses} died over {names}: {error}") from error
        logging.getLogger(__name__).warning("a worker died; its contexts are done again: %s", names)
        self.waiting.insert(0, group)
        self.give(self.begin())


def run_with_ray(
    run: Run,
    load: Load,
    output: str | os.PathLike[str],
    cluster: Cluster,
    *,
    shard_of: tuple[int, int] = (0, 1),
    force: bool = False,
    on_begin: Callable[[int], Callable[[Row], None]] | None = None,
) -> None:
    """Runs whatever a directory still lacks of a run, spread over workers; the rows equal those of a serial run.

    Args:
        run: The run.
        load: Makes model and tokenizer, in each worker.
        output: The run's directory, on this machine; workers write nothing.
        cluster: The workers to use.
        shard_of: ``(index, count)``: only every count-th context, beginning with ``index``.
        force: Whether to begin again; existing files are kept under other names.
        on_begin: Called with the number of missing rows; returns a function that is called with each row once that is
            on disk.

    Raises:
        MissingDependencyError: Ray is not installed.
        WorkerError: Workers keep dying over the same contexts.
        KVzipPressError: Whatever a worker or `RunDirectory` raises.
    """
    with _ray(cluster) as ray:
        remote = ray.remote(num_cpus=1, num_gpus=cluster.gpus_each)(Worker)
        workers = [remote.remote(run, load) for _ in range(cluster.workers)]
        record, groups, n_rows = ray.get(workers[0].describe.remote(shard_of))
        with RunDirectory(output, record, force=force) as directory:
            samples = frozenset[tuple[str, str]]().union(*(group.samples for group in groups))
            missing = n_rows - sum((key.task, key.sample_id) in samples for key in directory.done)
            on_row = None if on_begin is None else on_begin(missing)
            pool = _Pool(ray, lambda: remote.remote(run, load), frozenset(directory.done), groups)
            for worker in workers:
                pool.give(worker)
            while pool.at:
                rows, heads = pool.take()
                for line in heads:
                    directory.write_heads(line)
                for row in rows:
                    directory.write(row)
                    if on_row is not None:
                        on_row(row)


@contextmanager
def _ray(cluster: Cluster) -> Iterator[Any]:
    """Connects to Ray, and shuts it down afterwards if it was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray reports usage over the network
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(f"expected ray, found none: {install_command('ray')}") from error
    if ray.is_initialized():
        yield ray
        return
    alone: dict[str, Any] = {"num_cpus": max(cluster.workers, 1), "include_dashboard": False}
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({} if cluster.address else alone),
    )
    try:
        yield ray
    finally:
        ray.shutdown()
