"""The comparison of heads: full cache, KVzip's heads, DuoAttention's and random ones, each with the same ends."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvzip_press import HeadScores
from kvzip_press.leaderboard.benchmarks import heads
from kvzip_press.leaderboard.rows.results import Row, read_rows
from kvzip_press.loading import by_name
from kvzip_press.testing import ByteTokenizer, tiny_model

WINDOWS = ("", ", window 100")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, list[Row]]:
    """What a small run on a tiny model says, and its rows; its scores come from nowhere."""
    scores = HeadScores(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]))
    app = typer.Typer()
    app.command()(heads.main)
    path = tmp_path_factory.mktemp("heads") / "rows.jsonl"
    options = ["--contexts", "1", "--tokens", "600", "--window", "100", "--draws", "2", "--out", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_name, "load_model", lambda name, **_: (tiny_model(), ByteTokenizer()))
        patch.setattr(heads, "REMOVED", (0.5,))
        patch.setattr(HeadScores, "shipped", classmethod(lambda cls, folder, model: scores))
        done = CliRunner().invoke(app, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output, list(read_rows(path))


@pytest.mark.slow
def test_every_press_meets_every_question(run) -> None:
    _, rows = run
    drawn = [f"random heads{window} #{draw}" for window in WINDOWS for draw in range(2)]
    labels = [f"{name}{window}" for window in WINDOWS for name in ("kvzip_head", "duo_attention")] + drawn
    cells = {(row.press, row.compression_ratio) for row in rows}
    assert cells == {("full cache", 0.0), *((label, 0.5) for label in labels)}
    assert len(rows) == len(cells) * 16


@pytest.mark.slow
def test_of_one_context_all_presses_keep_as_many_bytes(run) -> None:
    _, rows = run
    kept = {}
    for row in rows:
        ends = row.press == "full cache", "window" in row.press, row.task, row.sample_id
        kept.setdefault(ends, set()).add((row.kept_fraction, row.resident_bytes))
    assert [len(measured) for measured in kept.values()] == [1] * 9


@pytest.mark.slow
def test_draws_share_a_row_of_the_table(run) -> None:
    said, _ = run
    assert "random heads" in said and "#" not in said
    assert "16 questions a press and ratio, 2 draws" in said.replace("\n", " ")


def test_draws_differ_and_are_the_same_in_every_run() -> None:
    one, other = (heads.head_presses((3, 2), 0, 2) for _ in range(2))
    drawn = [spec.options["scores"].values for spec in one if "random" in spec.label]
    assert not torch.equal(drawn[0], drawn[1])
    again = [spec.options["scores"].values for spec in other if "random" in spec.label]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
