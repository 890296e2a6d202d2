"""A summary file ties figures to rows: `verify` is green on what was run, and red on whatever was changed since."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError, RunDirectoryError
from kvzip_press.leaderboard.rows.results import Row, read_rows, run_id
from kvzip_press.leaderboard.run_summary import RunSummary, verify
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec
from kvzip_press.leaderboard.running.run_directory import RunRecord
from kvzip_press.leaderboard.tasks import get_task


@pytest.fixture
def run(tmp_path: Path, make_row: Callable[..., Row]) -> Path:
    """The directory of a whole run of eight rows."""
    task = replace(get_task("hidden_facts"), name="facts")  # as a grid names it
    config = Run(
        "tiny", (TaskSpec(task, 4, 100),), (PressSpec("kvzip", "kvzip"), PressSpec("random", "random")), (0.7,)
    ).config
    folder, known = tmp_path / "run", run_id(config)
    folder.mkdir()
    rows = [
        make_row(
            run_id=known, task="facts", press=press, sample_id=f"{i:04d}", prediction=said, score=float(said == "407.")
        )
        for press in ("kvzip", "random")
        for i, said in enumerate(["407.", "12.", "407.", "no"])
    ]
    (folder / "run.json").write_text(RunRecord(known, config, {"torch": "2"}, len(rows)).to_line())
    write(folder, rows)
    return folder


def write(folder: Path, rows: list[Row]) -> None:
    (folder / "rows.jsonl").write_text("".join(row.to_line() + "\n" for row in rows))


def rows_in(folder: Path) -> list[Row]:
    return list(read_rows(folder / "rows.jsonl"))


def test_what_was_run_is_verified_in_any_order(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    made = RunSummary.of(run)
    made.save(file)
    assert RunSummary.load(file) == made
    assert made.accuracies == {"kvzip @ 0.7": 0.5, "random @ 0.7": 0.5}
    write(run, rows_in(run)[::-1])
    assert verify(run, file).startswith("8 rows and the configuration")
    assert "8 scores follow from their predictions" in verify(run, file)


def test_rows_that_follow_the_full_cache_have_figures_of_their_own(run: Path, tmp_path: Path) -> None:
    """In the same run; their scores are no metric's, whatever the task."""
    task, press = get_task("hidden_facts"), PressSpec("kvzip", "kvzip")
    tasks = (TaskSpec(replace(task, name="facts"), 2, 100), TaskSpec(replace(task, name="f, a"), 2, 100, "agreement"))
    config = Run("tiny", tasks, (press,), (0.7,)).config
    first, second = (replace(row, run_id=run_id(config)) for row in rows_in(run)[:2])
    rows = [first, second]
    for row, kl in zip(rows[:2], (0.25, 0.75), strict=True):
        rows.append(replace(row, task="f, a", score=0.5, tags={**row.tags, "kl_nats": kl, "until_first": 3.0}))
    (run / "run.json").write_text(RunRecord(run_id(config), config, {"torch": "2"}, 4).to_line())
    write(run, rows)
    made = RunSummary.of(run)
    figures = {"kvzip @ 0.7": 0.5, "kvzip @ 0.7, agreement": 0.5, "kvzip @ 0.7, KL in nats": 0.5}
    assert made.accuracies == figures and made.n_questions == dict.fromkeys(figures, 2)
    made.save(tmp_path / "summary.json")
    said = verify(run, tmp_path / "summary.json")
    assert "2 scores follow from their predictions; of 2 the metric is not known here" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": 1.0}, "rows_sha256, accuracies differ, in 'kvzip @ 0.7'"),
        ({"prediction": "407."}, "rows_sha256 differ"),
        ({"answer_seconds": 0.1}, "rows_sha256 differ"),
    ],
)
def test_a_changed_row_is_found_though_it_has_a_new_seal(run: Path, tmp_path: Path, change: Any, said: str) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    first, second, *others = rows_in(run)
    write(run, [first, replace(second, **change), *others])
    with pytest.raises(InvalidArgumentError, match=said):
        verify(run, file)


def test_a_changed_file_and_a_missing_row_are_found(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    values = json.loads(file.read_text())
    values["accuracies"]["kvzip @ 0.7"] = 0.9
    file.write_text(json.dumps(values))
    with pytest.raises(InvalidArgumentError, match="changed after it was written"):
        verify(run, file)
    write(run, rows_in(run)[1:])
    with pytest.raises(RunDirectoryError, match="7 of the run's 8 rows: go on with it first"):
        RunSummary.of(run)


def test_a_score_that_its_prediction_does_not_have_is_found(run: Path, tmp_path: Path) -> None:
    """Also where rows and summary were made anew together."""
    file = tmp_path / "summary.json"
    first, second, *others = rows_in(run)
    write(run, [first, replace(second, score=1.0), *others])
    RunSummary.of(run).save(file)
    with pytest.raises(InvalidArgumentError, match=r"expected the score 0 of the prediction '12\.' .* got 1"):
        verify(run, file)


def test_the_commands_write_verify_and_compare(run: Path, tmp_path: Path, make_table: Callable[..., list[Row]]) -> None:
    def command(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, ["leaderboard", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    file, other = tmp_path / "summary.json", tmp_path / "other"
    assert "8 rows, sha256" in command("summary", run, "--output", file)
    assert "8 scores follow from their predictions" in command("verify", run, file)
    other.mkdir()
    write(other, make_table())
    assert command("table", other, "--format", "markdown").splitlines()[1].startswith("| --- |")
    assert r"\begin{tabular}" in command("table", other, "--format", "latex")
    assert "mean over ratios: +1.00" in " ".join(command("correlate", other, other).split())
    shown = " ".join(command("table", other).split())
    assert "Area under accuracy over" in shown and "Smallest difference from the full cache" in shown
