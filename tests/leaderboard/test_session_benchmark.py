"""The benchmark of a running batch: all ways answer the same questions, and say where steps could not be captured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvzip_press.leaderboard.benchmarks import session
from kvzip_press.testing import tiny_model


@pytest.mark.parametrize("storage", ["model", "int8"])
def test_it_runs_on_a_small_model(storage: str, tmp_path: Path, one_thread: None) -> None:
    app, path = typer.Typer(), tmp_path / "figures.json"
    app.command()(session.main)
    options = ["--users", "3", "--tokens", "60", "--question", "5", "--answer", "6", "--repeats", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "measured_model", lambda *_: tiny_model(num_layers=2))
        arguments = [*options, "--device", "cpu", "--storage", storage, "--output", str(path)]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    assert [(row["way"], row["contexts"]) for row in rows] == [(way, n) for n in (1, 3) for way in session.WAYS]
    assert all(len(row["tokens_per_second"]) == 2 and min(row["tokens_per_second"]) > 0 for row in rows)
    assert [row["same"] for row in rows] == [3] * 6
    assert [row["note"] for row in rows] == [None, None, "the model is on cpu"] * 2
    assert "steps were not captured: the model is on cpu" in done.output
