"""The benchmark of weighted rows runs on any model and says what weighting costs for both replays."""

import pytest

from kvzip_press.leaderboard.benchmarks import weighting
from kvzip_press.testing import ByteTokenizer, tiny_model


def test_it_says_the_cost_of_both_replays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(weighting, "load_model", lambda _: (tiny_model(num_layers=1), ByteTokenizer()))
    monkeypatch.setenv("COLUMNS", "120")
    weighting.main(model="tiny", tokens=300, repeats=1)
    shown = capsys.readouterr().out
    assert shown.count("surprisal") == 2 and shown.count("%") == 2
    assert "tiny, 300 tokens, medians of 1 runs in turns" in shown
