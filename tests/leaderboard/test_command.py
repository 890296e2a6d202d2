"""`kvzip-press leaderboard`: a grid into a directory, on with it, shards, tables, and errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kvzip_press.cli.main import app, main
from kvzip_press.errors import KVzipPressError, MissingDependencyError
from kvzip_press.leaderboard.rows.results import Row, read_rows
from kvzip_press.leaderboard.running import plan
from kvzip_press.leaderboard.running.run_directory import RunRecord
from kvzip_press.loading import by_name
from kvzip_press.testing import ByteTokenizer, tiny_model

GRID = {
    "model": "tiny",
    "compression_ratios": [0.5, 0.9],
    "tasks": [{"task": "hidden_facts", "contexts": 4, "tokens": 120, "options": {"n_keys": 2, "max_new_tokens": 1}}],
    "presses": [{"press": "none", "label": "full cache", "compression_ratios": [0.0]}, {"press": "random"}],
}


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The command's models are tiny; what was asked for."""
    asked: list[tuple[str, Any]] = []

    def load(name: str, dtype: Any) -> tuple[Any, Any]:
        asked.append((name, dtype))
        return tiny_model(num_layers=1), ByteTokenizer()

    monkeypatch.setattr(by_name, "load_model", load)
    monkeypatch.setenv("COLUMNS", "120")
    return asked


@pytest.fixture
def grid(tmp_path: Path) -> str:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID), encoding="utf-8")
    return str(path)


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["leaderboard", *map(str, arguments)])
    if isinstance(result.exception, KVzipPressError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def rows_in(path: Path) -> list[Row]:
    return list(read_rows(path / "rows.jsonl"))


def test_a_grid_is_run_into_a_directory_and_its_table_printed(grid: str, tmp_path: Path, loaded: Any) -> None:
    printed = command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu")
    assert len(rows_in(tmp_path / "run")) == 4 * 2 * 3
    for shown in ("tiny, query-agnostic: 8 questions a row", "full cache", "random", "0.90", "rows.jsonl"):
        assert shown in printed
    assert "of the run's" not in printed
    assert loaded == [("tiny", "auto")]
    assert command("table", tmp_path / "run").split() == printed.split()
    again = command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu")
    assert len(rows_in(tmp_path / "run")) == 4 * 2 * 3
    assert again.split() == printed.split()


def test_options_replace_what_the_grid_says(grid: str, tmp_path: Path, loaded: Any) -> None:
    options = ["--model", "other", "--dtype", "fp32", "--contexts", "1", "--batch-size", "2", "--query-aware"]
    printed = command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu", *options, "--truncate")
    config = RunRecord.read(tmp_path / "run").config
    said = {"model_name": "other", "dtype": "fp32", "batch_size": 2, "query_aware": True, "truncate": True}
    assert {name: config[name] for name in said} == said
    assert config["tasks"][0]["n_contexts"] == 1
    assert "other, query-aware: 2 questions a row" in printed
    assert [(name, str(dtype)) for name, dtype in loaded] == [("other", "torch.float32")]


def test_shards_are_run_apart_and_joined(grid: str, tmp_path: Path) -> None:
    for index in range(2):
        where = tmp_path / str(index)
        printed = command("run", "--grid", grid, "--output", where, "--shard", f"{index}/2", "--device", "cpu")
        assert "12 of the run's 24 rows" in printed
    printed = command("merge", tmp_path / "0", tmp_path / "1", "--output", tmp_path / "all")
    assert "8 questions a row" in printed
    assert "of the run's" not in printed
    assert len({row.key for row in rows_in(tmp_path / "all")}) == 24


def test_force_begins_again(grid: str, tmp_path: Path) -> None:
    command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu")
    with pytest.raises(KVzipPressError, match=r"n_contexts: 4, 1.*--force"):
        command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu", "--contexts", "1")
    command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu", "--contexts", "1", "--force")
    assert len(rows_in(tmp_path / "run")) == 6
    assert len(list(read_rows(tmp_path / "run" / "rows.1.jsonl"))) == 24


def test_presses_that_are_not_to_be_had_end_the_run_or_are_left_out(
    grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    presses = [
        *GRID["presses"],
        {"press": "fastkvzip"},
        {"press": "kvzip_head"},
        {"press": "random", "label": "gone", "options": {"seed": 7}},
    ]
    Path(grid).write_text(yaml.safe_dump({**GRID, "presses": presses}), encoding="utf-8")
    get_press = plan.get_press

    def absent(name: str, **options: Any) -> Any:
        if name == "random" and options.get("seed") == 7:
            raise MissingDependencyError("found no package")
        return get_press(name, **options)

    with pytest.raises(KVzipPressError, match="expected gates for"):
        command("run", "--grid", grid, "--output", tmp_path / "a", "--device", "cpu")
    monkeypatch.setattr(plan, "get_press", absent)
    with pytest.raises(KVzipPressError, match="found no package"):
        command("run", "--grid", grid, "--output", tmp_path / "a", "--device", "cpu")
    printed = command("run", "--grid", grid, "--output", tmp_path / "b", "--device", "cpu", "--skip-unavailable")
    for label in ("fastkvzip (expected gates", "kvzip_head (expected", "gone (found no package"):
        assert f"left out: {label}" in printed
    assert {row.press for row in rows_in(tmp_path / "b")} == {"full cache", "random"}


def test_the_list_names_grids_tasks_and_presses() -> None:
    printed = command("list")
    for name in ("quick", "smollm2-full", "hidden_facts", "kvzip", "Small contexts on the embedded model"):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--grid", "quik"], "did you mean 'quick'"),
        (["run", "--grid", "quick", "--shard", "2"], "expected --shard I/N, such as 0/4, got '2'"),
        (["run", "--grid", "quick", "--shard", "4/4"], "0 <= I < N, got 4/4"),
        (["run", "--grid", "quick", "--device", "tpu"], "expected the device cpu"),
        (["run", "--grid", "quick", "--dtype", "int3"], "expected a dtype among"),
        (["run", "--grid", "quick", "--contexts", "0"], "at least 1, got 0"),
        (
            ["run", "--grid", "quick", "--executor", "slurm"],
            "expected --executor to be one of serial, processes, ray, openai, got 'slurm'",
        ),
        (
            ["run", "--grid", "quick", "--workers", "8"],
            "expected --workers with --executor processes or ray, got it",
        ),
        (
            ["run", "--grid", "quick", "--executor", "processes", "--address", "a:1"],
            "expected --address with --executor ray or openai, got it with 'processes'",
        ),
        (["run", "--grid", "quick", "--executor", "ray", "--workers", "0"], "expected workers >= 1 .* got 0"),
        (["run", "--grid", "quick", "--executor", "processes", "--workers", "0"], "one worker or more, got none"),
    ],
)
def test_what_is_out_of_range_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(KVzipPressError, match=message):
        command(*arguments, "--output", tmp_path / "run")
    assert not (tmp_path / "run" / "rows.jsonl").exists()


@pytest.mark.parametrize("arguments", [["table"], ["merge", "--output", "out"]])
def test_a_directory_without_a_run_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(KVzipPressError, match="expected the directory of a run"):
        command(arguments[0], tmp_path, *arguments[1:])


def test_errors_of_the_commands_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvzip-press", "leaderboard", "table", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: expected the directory of a run")


@pytest.mark.parametrize("arguments", [["run", "--gird", "quick"], ["rum"]])
def test_a_misspelt_option_or_command_is_an_error_of_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["leaderboard", *arguments])
    assert result.exit_code == 2
    assert "No such" in result.output


def test_help_is_of_the_command_that_is_asked_about() -> None:
    assert "--skip-unavailable" in command("run", "--help")
    assert "merge" in command("--help")


def test_no_rows_make_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    assert "rows.jsonl" in command("table", tmp_path)


def test_a_run_becomes_a_page_and_folders_and_rows_again(grid: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu")
    page = tmp_path / "page.html"
    options = ("--title", "Ours & theirs", "--command", "make it <again>")
    assert "page.html" in command("report", tmp_path / "run", "--output", page, *options)
    assert "<title>Ours &amp; theirs</title>" in page.read_text(encoding="utf-8")
    assert "make it \\u003cagain\\u003e" in page.read_text(encoding="utf-8")
    assert "full cache" in page.read_text(encoding="utf-8")
    command("export", tmp_path / "run", "--output", tmp_path / "folders", "--data-dir", "4096")
    assert all("__4096__" in folder.name for folder in (tmp_path / "folders").iterdir())
    assert "24 rows" in command("import", tmp_path / "folders", "--output", tmp_path / "back")
    assert sorted(rows_in(tmp_path / "back"), key=lambda row: row.key) == sorted(
        rows_in(tmp_path / "run"), key=lambda row: row.key
    )
    with pytest.raises(KVzipPressError, match=r"expected a directory without rows.jsonl"):
        command("import", tmp_path / "folders", "--output", tmp_path / "back")
    with pytest.raises(KVzipPressError, match="expected --format kvpress, got 'csv'"):
        command("export", tmp_path / "run", "--output", tmp_path / "folders", "--format", "csv")


def test_what_a_report_and_an_export_lack_is_said(grid: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    command("run", "--grid", grid, "--output", tmp_path / "run", "--device", "cpu", "--shard", "0/2")
    heads = (tmp_path / "run" / "heads.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "run" / "heads.jsonl").write_text("".join(heads[1:]), encoding="utf-8")
    printed = command("report", tmp_path / "run", "--output", tmp_path / "new" / "page.html")
    assert "12 of the run's 24 rows; heads of 5 of 6 caches" in printed
    assert "12 of the run's 24 rows" in command("export", tmp_path / "run", "--output", tmp_path / "folders")
