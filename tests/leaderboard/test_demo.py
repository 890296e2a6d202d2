"""The demo on a tiny model: files, table, what is left out, and the time limit."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvzip_press.errors import MissingDependencyError
from kvzip_press.leaderboard import demo
from kvzip_press.leaderboard.rows.results import read_rows
from kvzip_press.leaderboard.running import plan
from kvzip_press.leaderboard.running.grid import load_grid
from kvzip_press.leaderboard.running.plan import TaskSpec
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.testing import ByteTokenizer, tiny_model

TASKS = (
    TaskSpec(get_task("hidden_facts", n_keys=2, max_new_tokens=1), n_contexts=2, length_tokens=100),
    TaskSpec(get_task("profile_qa", n_people=1, n_attributes=2, max_new_tokens=1), n_contexts=1, length_tokens=160),
)


@pytest.fixture(autouse=True)
def without_weights_and_kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    get_press = plan.get_press

    def get_press_without_kvpress(name: str, **options: Any) -> Any:
        if name in ("snapkv", "adakv_expected_attention"):
            raise MissingDependencyError("kvpress is absent: pip install kvpress")
        return get_press(name, **options)

    monkeypatch.setattr(demo, "load_model", lambda name: (tiny_model(num_layers=1), ByteTokenizer()))
    monkeypatch.setattr(plan, "get_press", get_press_without_kvpress)


def run(directory: Path, **options: Any) -> tuple[demo.Demo, str]:
    console = Console(file=io.StringIO(), width=110)
    done = demo.run_demo(directory, tasks=TASKS, console=console, **options)
    return done, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_demo_writes_rows_and_picture_and_prints_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done, printed = run(tmp_path)
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    assert len(rows) == (1 + 1 + 3) * 6
    assert done.rows_path == tmp_path / "rows.jsonl"
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.cells) == 5
    for text in ("full cache", "random", "KVzip", "6 questions a row", str(tmp_path / "pareto.png")):
        assert text in printed.replace("\n", "")


def test_presses_without_their_package_or_gates_are_left_out_with_one_line_each(tmp_path: Path) -> None:
    done, printed = run(tmp_path)
    assert {cell.press for cell in done.cells} == {"full cache", "random", "KVzip"}
    assert printed.count("left out:") == 3
    assert "pip install kvpress" in printed
    assert "left out: Fast KVzip (gated) (expected gates for" in printed


def test_the_time_limit_ends_the_demo_after_whole_contexts(tmp_path: Path) -> None:
    _, printed = run(tmp_path, time_limit_seconds=0.0)
    assert "stopped after 1 of 3 contexts" in printed
    assert len(list(read_rows(tmp_path / "rows.jsonl"))) == (1 + 1 + 3) * 2


def test_rows_of_an_earlier_demo_are_kept_aside(tmp_path: Path) -> None:
    run(tmp_path, seed=1, time_limit_seconds=0.0)
    run(tmp_path, seed=2, time_limit_seconds=0.0)
    assert {row.seed for row in read_rows(tmp_path / "rows.jsonl")} == {2}
    assert {row.seed for row in read_rows(tmp_path / "rows.previous.jsonl")} == {1}


def test_no_earlier_rows_are_lost_however_many_demos_there_were(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    (tmp_path / "rows.previous.jsonl").write_text("mine", encoding="utf-8")
    for number in range(2):
        path.write_text(str(number), encoding="utf-8")
        assert demo._fresh(path) == path and not path.exists()
    names = ("rows.previous.jsonl", "rows.previous.1.jsonl", "rows.previous.2.jsonl")
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in names] == ["1", "mine", "0"]


def test_without_matplotlib_there_is_no_picture_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done, printed = run(tmp_path, time_limit_seconds=0.0)
    assert done.picture_path is None
    assert "no picture" in printed


def test_the_presses_of_the_demo_are_those_of_the_readme() -> None:
    run = load_grid(demo.GRID).run
    assert [spec.name for spec in run.presses] == [
        "none",
        "random",
        "kvzip",
        "fastkvzip",
        "snapkv",
        "adakv_expected_attention",
    ]
    assert run.compression_ratios == (0.5, 0.7, 0.9)
    per_cell = sum(
        len(sample.questions) * spec.n_contexts
        for spec in run.tasks
        for sample in spec.task.samples(seed=0, n=1, length_tokens=450)
    )
    assert per_cell >= 60
