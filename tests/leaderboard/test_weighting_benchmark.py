"""The benchmark of weighted rows runs on any model and says what weighting costs for both replays."""

import pytest
import torch

from kvzip_press.leaderboard.benchmarks import weighting
from kvzip_press.leaderboard.profile.shapes import get_shape, random_model
from kvzip_press.loading import by_name
from kvzip_press.testing import ByteTokenizer, tiny_model


def test_it_says_the_cost_of_both_replays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(by_name, "load_model", lambda name, **_: (tiny_model(num_layers=1), ByteTokenizer()))
    monkeypatch.setenv("COLUMNS", "120")
    weighting.main(model="tiny", tokens=300, repeats=1)
    shown = capsys.readouterr().out
    assert shown.count("surprisal") == 2 and shown.count("%") == 2
    assert "tiny, 300 tokens, medians of 1 runs in turns" in shown


def test_flops_are_those_of_the_published_sizes() -> None:
    """Llama 3.1 8B: 32 layers, 32 heads of 128; without embeddings and head 6.98 billion weights."""
    model, n = random_model(get_shape("llama3.1-8b"), torch.device("meta"), torch.bfloat16), 64000
    found = weighting.ScoringFlops.of(model, n)
    assert found.layers == pytest.approx(2 * 6.979e9 * n, rel=1e-3)
    assert found.attention == 4 * 32 * 32 * 128 * (n + 1024) * n
    assert found.scores == 2 * 32 * 32 * 128 * (2048 + 1024) * n
    assert found.head == 2 * 4096 * 128256 * n
    assert found.head_share == pytest.approx(0.022, abs=5e-4)
    local = weighting.ScoringFlops.of(model, n, local=True)
    assert local.attention == 4 * 32 * 32 * 128 * (2048 + 1024) * n
    assert local.head_share == weighting.ScoringFlops.of(model, 4000, local=True).head_share


def test_a_calculation_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    weighting.main(shape="qwen2.5-0.5b", calculate=True)
    shown = capsys.readouterr().out
    assert "21.3%" in shown and "25.5%" in shown
