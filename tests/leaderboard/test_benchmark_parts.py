"""Parts of a benchmark: the same of any number of processes, and none is made twice."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from kvzip_press.errors import InvalidArgumentError, WorkerError
from kvzip_press.leaderboard.benchmarks.parts import Part, parts_of

pytestmark = pytest.mark.any_transformers


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Any]]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import loaded_by_benchmarks  # as other processes do

    def doubled(*numbers: int, workers: int = 1, fails: bool = False, **settings: Any) -> list[Any]:
        make = functools.partial(loaded_by_benchmarks.Doubles, tmp_path)
        output = tmp_path / "figures.json"
        with parts_of(make, device="cpu", workers=workers, settings=settings, output=output) as parts:
            found = parts.results([Part("double", (number,)) for number in numbers], "numbers")
            if fails:
                raise KeyError("behind the parts")
        return found

    return doubled


def made(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "made").read_text().split())


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_parts(
    tmp_path: Path, doubled: Callable[..., list[Any]], workers: int
) -> None:
    assert doubled(5, 3, 4, 1, workers=workers) == [[5, 10], [3, 6], [4, 8], [1, 2]]
    assert made(tmp_path) == ["1", "3", "4", "5"]
    assert not list(tmp_path.glob("*.jsonl")), "all is in the figures now"


def test_a_run_that_was_stopped_goes_on_with_any_number_of_processes(
    tmp_path: Path, doubled: Callable[..., list[Any]]
) -> None:
    with pytest.raises(KeyError):
        doubled(1, 2, fails=True)
    kept = tmp_path / "figures.parts.jsonl"
    kept.write_bytes(kept.read_bytes() + b'{"settings": "ha')
    assert doubled(2, 1, 3, workers=2) == [[2, 4], [1, 2], [3, 6]]
    assert made(tmp_path) == ["1", "2", "3"]


def test_a_process_that_dies_costs_only_what_was_being_made(tmp_path: Path, doubled: Callable[..., list[Any]]) -> None:
    numbers = 1, 2, 3, 4, 13
    with pytest.raises(WorkerError, match="but its process ended with -9: what was made before is kept"):
        doubled(*numbers, workers=2)
    (tmp_path / "made").unlink()
    with pytest.raises(WorkerError):
        doubled(*numbers, workers=2)
    assert "13" in made(tmp_path) and len(made(tmp_path)) <= 2


def test_parts_of_other_settings_are_kept_aside(
    tmp_path: Path, doubled: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError):
        doubled(1, fails=True, seed=1)
    with caplog.at_level(logging.WARNING):
        assert doubled(1, seed=2) == [[1, 2]]
    assert made(tmp_path) == ["1", "1"]
    assert "is kept aside as figures.parts.1.jsonl" in caplog.text


def test_a_damaged_part_and_no_workers_are_refused(tmp_path: Path, doubled: Callable[..., list[Any]]) -> None:
    with pytest.raises(KeyError):
        doubled(1, fails=True)
    kept = tmp_path / "figures.parts.jsonl"
    kept.write_text(kept.read_text().replace("[1, 2]", "[1, 3]"))
    with pytest.raises(InvalidArgumentError, match="expected a part of a benchmark in JSON"):
        doubled(1)
    with pytest.raises(typer.BadParameter, match="expected --workers of 1 or more, got 0"):
        doubled(1, workers=0)
