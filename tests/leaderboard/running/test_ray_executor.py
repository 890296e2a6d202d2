"""Ray spreads a run over workers: the rows are the serial run's, whatever dies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, WorkerError
from kvzip_press.leaderboard.rows.head_budgets import read_heads
from kvzip_press.leaderboard.rows.results import Row, read_rows
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, plan
from kvzip_press.leaderboard.running.ray_executor import MOST_LOSSES, Cluster, run_with_ray
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.testing import ByteTokenizer, tiny_model

TIMES = ("prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds")
TWO = Cluster(workers=2, gpus_each=0)
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


def by_key(rows: Any) -> list[Row]:
    return sorted((replace(row, **dict.fromkeys(TIMES, 0.0), provenance={}) for row in rows), key=lambda row: row.key)


@pytest.fixture(scope="module")
def serial() -> list[Row]:
    return by_key(execute(RUN, plan(RUN, ByteTokenizer()), tiny_model(num_layers=1), ByteTokenizer()))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    """One for all tests: it takes seconds to begin."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def loader(folder: Path, *, dies: bool = False) -> Callable[[], tuple[Any, Any]]:
    """What workers load; each leaves a file of its process's number. Nested, so that it is sent by value."""

    def load() -> tuple[Any, Any]:
        model = tiny_model(num_layers=1)
        (folder / str(os.getpid())).touch()
        if dies:
            model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            model.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return model, ByteTokenizer()

    return load


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one_and_a_killed_ones_are_done_again(
    tmp_path: Path, serial: list[Row], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pids").mkdir()
    told: list[Any] = []

    def on_row(row: Row) -> None:
        told.append(row.key)
        if len(told) == 2:
            os.kill(int(next((tmp_path / "pids").iterdir()).name), signal.SIGKILL)

    run_with_ray(RUN, loader(tmp_path / "pids"), tmp_path / "run", TWO, on_begin=lambda missing: on_row)
    assert len(serial) == 10 * 2 * 3
    assert sorted(told) == [row.key for row in serial]
    assert by_key(read_rows(tmp_path / "run" / "rows.jsonl")) == serial
    assert len(list(read_heads(tmp_path / "run" / "heads.jsonl"))) == 10 * 3
    assert len(list((tmp_path / "pids").iterdir())) == 3
    assert "a worker died" in caplog.text


@pytest.mark.slow
def test_a_run_goes_on_with_what_is_missing_and_shards_are_of_the_whole(tmp_path: Path, serial: list[Row]) -> None:
    (tmp_path / "pids").mkdir()
    missing: list[int] = []

    def on_begin(n_rows: int) -> Callable[[Row], None]:
        missing.append(n_rows)
        return lambda row: None

    for shard_of in ((0, 2), (0, 1), (0, 1)):
        run_with_ray(RUN, loader(tmp_path / "pids"), tmp_path / "run", TWO, shard_of=shard_of, on_begin=on_begin)
    assert missing == [30, 30, 0]
    assert by_key(read_rows(tmp_path / "run" / "rows.jsonl")) == serial


@pytest.mark.slow
def test_contexts_that_kill_every_worker_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    with pytest.raises(WorkerError, match=rf"{MOST_LOSSES} died over (hidden_facts|profile_qa)/0000"):
        run_with_ray(RUN, loader(tmp_path / "pids", dies=True), tmp_path / "run", Cluster(1, gpus_each=0))
    assert len(list((tmp_path / "pids").iterdir())) == MOST_LOSSES


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_runs(tmp_path: Path) -> None:
    broken = replace(RUN, presses=(PressSpec("fastkvzip", "gated"),))
    with pytest.raises(InvalidArgumentError, match="expected gates for"):
        run_with_ray(broken, loader(tmp_path), tmp_path / "run", TWO)


@pytest.mark.parametrize("numbers", [{"workers": 0}, {"workers": 1, "gpus_each": -1.0}])
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="expected workers >= 1 and gpus_each >= 0"):
        Cluster(**numbers)


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="kvzip-press\\[ray\\]"):
        run_with_ray(RUN, loader(tmp_path), tmp_path / "run", TWO)
