"""Workers on several GPUs or machines, which Ray starts and watches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, install_command
from kvzip_press.leaderboard.running.plan import Run
from kvzip_press.leaderboard.running.spread import Load, Worker, WorkerDiedError


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


class RayWorkers:
    """Workers as Ray's actors: see :class:`~kvzip_press.leaderboard.running.spread.Workers`."""

    def __init__(self, ray: Any, cluster: Cluster, run: Run, load: Load) -> None:
        self.ray, self.count = ray, cluster.workers
        self._begin = lambda: ray.remote(num_cpus=1, num_gpus=cluster.gpus_each)(Worker).remote(run, load)
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}  # future of a result -> number of its worker

    def start(self, number: int) -> None:
        """Begins an actor, in place of the one that had this number."""
        self._actors[number] = self._begin()

    def ask(self, number: int, method: str, *arguments: Any) -> None:
        """Has an actor call one of its methods."""
        self._asked[getattr(self._actors[number], method).remote(*arguments)] = number

    def wait(self) -> tuple[int, Any]:
        """Waits for any result, and returns it with the worker's number."""
        [first], _ = self.ray.wait(list(self._asked), num_returns=1)
        number = self._asked.pop(first)
        try:
            return number, self.ray.get(first)
        except self.ray.exceptions.RayActorError as error:
            raise WorkerDiedError(number, str(error)) from error


@contextmanager
def ray_workers(run: Run, load: Load, cluster: Cluster) -> Iterator[RayWorkers]:
    """Connects to Ray for the workers of a run, and shuts it down afterwards if it was started here.

    Args:
        run: The run.
        load: Makes model and tokenizer, in each worker.
        cluster: The workers to use.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray reports usage over the network
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(f"expected ray, found none: {install_command('ray')}") from error
    if ray.is_initialized():
        yield RayWorkers(ray, cluster, run, load)
        return
    alone: dict[str, Any] = {"num_cpus": max(cluster.workers, 1), "include_dashboard": False}
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({} if cluster.address else alone),
    )
    try:
        yield RayWorkers(ray, cluster, run, load)
    finally:
        ray.shutdown()
