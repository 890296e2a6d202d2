"""A run that is spread over workers has the rows of a serial one, whatever dies.

What does not depend on the executor is tested with workers that stand in: a real one takes seconds to begin.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, WorkerError
from kvzip_press.leaderboard.launch import launch_spread
from kvzip_press.leaderboard.rows.head_budgets import read_heads
from kvzip_press.leaderboard.rows.results import Row, read_rows
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, plan
from kvzip_press.leaderboard.running.process_executor import places, process_workers, processes
from kvzip_press.leaderboard.running.ray_executor import Cluster, ray_workers
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.leaderboard.running.spread import MOST_LOSSES, Worker, WorkerDiedError, Workers, spread
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.any_transformers

TIMES = ("prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds")
RUN = Run(
    "tiny",
    (
        TaskSpec(get_task("hidden_facts", n_keys=2, max_new_tokens=2), n_contexts=7, length_tokens=120),
        TaskSpec(get_task("profile_qa", n_people=1, n_attributes=2, max_new_tokens=2), 3, 160),
    ),
    (PressSpec("none", "full cache", compression_ratios=(0.0,)), PressSpec("random", "random")),
    (0.5, 0.9),
    seed=3,
    batch_size=2,
)

Begin = Callable[..., AbstractContextManager[Workers]]


def by_key(rows: Any) -> list[Row]:
    return sorted((replace(row, **dict.fromkeys(TIMES, 0.0), provenance={}) for row in rows), key=lambda row: row.key)


@pytest.fixture(scope="module")
def serial() -> list[Row]:
    return by_key(execute(RUN, plan(RUN, ByteTokenizer()), tiny_model(num_layers=1), ByteTokenizer()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One for all tests: it takes seconds to begin."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Makes what workers load; files of their processes' numbers are in `tmp_path / "pids"`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import loaded_by_workers  # as other processes do

    (tmp_path / "pids").mkdir()
    return lambda **options: loaded_by_workers.Loader(tmp_path / "pids", **options)


@pytest.fixture(params=["processes", "ray"])
def begin(request: pytest.FixtureRequest, loader: Callable[..., Any]) -> Begin:
    """Begins workers of either executor."""

    def processes(run: Run, count: int = 2, **options: bool) -> AbstractContextManager[Workers]:
        return process_workers(run, [loader(**options)] * count)

    def of_ray(run: Run, count: int = 2, **options: bool) -> AbstractContextManager[Workers]:
        return ray_workers(run, loader(**options), Cluster(count, gpus_each=0))

    if request.param == "processes":
        return processes
    request.getfixturevalue("cluster")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules["loaded_by_workers"])
    return of_ray


def pids(tmp_path: Path) -> list[int]:
    return [int(path.name) for path in (tmp_path / "pids").iterdir()]


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one_and_a_killed_ones_are_done_again(
    tmp_path: Path, serial: list[Row], begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    with begin(RUN, dies=True) as workers:
        spread(workers, tmp_path / "run", on_begin=lambda missing: lambda row: told.append(row.key))
    assert len(serial) == 10 * 2 * 3
    assert sorted(told) == [row.key for row in serial]
    assert by_key(read_rows(tmp_path / "run" / "rows.jsonl")) == serial
    assert len(list(read_heads(tmp_path / "run" / "heads.jsonl"))) == 10 * 3
    assert len(pids(tmp_path)) == 3
    assert "a worker died" in caplog.text


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_runs(tmp_path: Path, begin: Begin) -> None:
    broken = replace(RUN, presses=(PressSpec("fastkvzip", "gated"),))
    with begin(broken, 1) as workers, pytest.raises(InvalidArgumentError, match="expected gates for"):
        spread(workers, tmp_path / "run")


class Here:
    """Workers of this process, which answer when they are waited for; the last that was asked is the first.

    Args:
        dies: At which answers a worker dies instead, counted from 0.
    """

    def __init__(self, run: Run, count: int, dies: Callable[[int], bool] = lambda number: False) -> None:
        self.run, self.count, self.dies = run, count, dies
        self.started, self.answers = 0, 0
        self.workers: dict[int, Worker] = {}
        self.asked: list[tuple[int, str, tuple[Any, ...]]] = []

    def start(self, number: int) -> None:
        self.started += 1
        self.workers[number] = Worker(self.run, lambda: (tiny_model(num_layers=1), ByteTokenizer()))

    def ask(self, number: int, method: str, *arguments: Any) -> None:
        assert number not in [asked for asked, *_ in self.asked]
        self.asked.append((number, method, arguments))

    def wait(self) -> tuple[int, Any]:
        number, method, arguments = self.asked.pop()
        self.answers += 1
        if self.dies(self.answers - 1):
            raise WorkerDiedError(number, "in a test")
        return number, getattr(self.workers[number], method)(*arguments)


def test_a_run_goes_on_with_what_is_missing_and_shards_are_of_the_whole(tmp_path: Path, serial: list[Row]) -> None:
    missing: list[int] = []

    def on_begin(n_rows: int) -> Callable[[Row], None]:
        missing.append(n_rows)
        return lambda row: None

    for shard_of in ((0, 2), (0, 1), (0, 1)):
        spread(Here(RUN, 2), tmp_path / "run", shard_of=shard_of, on_begin=on_begin)
    assert missing == [30, 30, 0]
    assert by_key(read_rows(tmp_path / "run" / "rows.jsonl")) == serial


@pytest.mark.parametrize(("count", "sizes"), [(1, {1, 2}), (2, {1, 2}), (3, {1}), (9, {1})])
def test_batches_are_small_enough_for_every_worker(count: int, sizes: set[int]) -> None:
    worker = Worker(RUN, lambda: (tiny_model(num_layers=1), ByteTokenizer()))
    record, groups, n_rows = worker.describe((0, 1), count)
    assert sorted(place for group in groups for place in group.places) == list(range(10))
    assert {len(group.places) for group in groups} == sizes
    assert n_rows == 60 == record.n_rows


@pytest.mark.parametrize("count", [1, 3, 9])
def test_every_second_answer_may_be_a_death(count: int, tmp_path: Path, serial: list[Row]) -> None:
    workers = Here(RUN, count, dies=lambda number: number % 2 == 1)
    spread(workers, tmp_path / "run")
    assert by_key(read_rows(tmp_path / "run" / "rows.jsonl")) == serial
    assert workers.started > count


def test_contexts_that_kill_every_worker_end_the_run(tmp_path: Path) -> None:
    workers = Here(RUN, 1, dies=lambda number: number > 0)
    with pytest.raises(WorkerError, match=rf"{MOST_LOSSES} died over hidden_facts/0000, .*: in a test"):
        spread(workers, tmp_path / "run")
    assert workers.started == MOST_LOSSES
    with pytest.raises(WorkerError, match="expected a worker that loads the model, but it died: in a test"):
        spread(Here(RUN, 2, dies=lambda number: True), tmp_path / "run")


def test_a_worker_has_the_environment_of_the_time_when_it_is_started(
    monkeypatch: pytest.MonkeyPatch, loader: Callable[..., Any]
) -> None:
    """Such as the GPUs that it may use, whatever was so when the first worker of this process was started."""
    from loaded_by_workers import Environment

    def seen() -> Any:
        with processes([Environment]) as workers:
            workers.start(0)
            workers.ask(0, "value", "CUDA_VISIBLE_DEVICES")
            return workers.wait()[1]

    for value in ("1", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert seen() == value
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert seen() is None


@pytest.mark.parametrize("gpus", [False, True])
def test_an_error_that_cannot_be_sent_is_told_by_its_name_and_no_process_is_left(
    tmp_path: Path, loader: Callable[..., Any], gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether processes are forked, or begin anew, as they do where there are GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    with (
        process_workers(RUN, [loader(fails=True)]) as workers,
        pytest.raises(WorkerError, match=r"(?s)UnsendableError: 1 and 2\n.*loaded_by_workers\.py"),
    ):
        spread(workers, tmp_path / "run")
    with pytest.raises(ProcessLookupError):
        os.kill(pids(tmp_path)[0], 0)


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    for numbers in ({"workers": 0}, {"workers": 1, "gpus_each": -1.0}):
        with pytest.raises(InvalidArgumentError, match="expected workers >= 1 and gpus_each >= 0"):
            Cluster(**numbers)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="expected one worker or more, got none"):
        launch_spread(RUN, tmp_path / "run", executor="processes", workers=0)


def test_processes_share_the_gpus_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert places("cuda", 5) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert places("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert places("cpu", 2) == ["cpu", "cpu"]


def test_without_ray_the_error_says_what_to_install(
    loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="kvzip-press\\[ray\\]"), ray_workers(RUN, loader(), Cluster(1)):
        pass
