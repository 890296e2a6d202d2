"""The shapes of scores: figures that are known for scores that were made up, and a run on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvzip_press.leaderboard.benchmarks import score_shapes
from kvzip_press.loading import by_name
from kvzip_press.presses.fastkvzip.gate import LayerGate
from kvzip_press.presses.fastkvzip.gates import Gates
from kvzip_press.testing import ByteTokenizer, tiny_model


def test_correlations_are_those_of_scipy() -> None:
    """Equal scores share their mean rank."""
    one, other = (torch.randint(0, 6, (3, 40), generator=torch.Generator().manual_seed(i)).float() for i in (0, 1))
    expected = pytest.importorskip("scipy.stats").spearmanr(one.flatten(), other.flatten()).statistic
    assert score_shapes.rank_correlation(one, other) == pytest.approx(expected)
    assert score_shapes.rank_correlation(one, one * 3 + 1) == pytest.approx(1)


def test_neighbours_are_compared_inside_heads() -> None:
    """Heads of different levels are not smooth for that."""
    levels = torch.tensor([[1.0, -1.0] * 10, [101.0, 99.0] * 10])
    assert score_shapes.correlation(levels[:, :-1], levels[:, 1:]) == pytest.approx(-1, abs=0.01)


def test_it_compares_gates_and_weights_with_kvzip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, path = tiny_model(num_layers=2), tmp_path / "gate.safetensors"
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    Gates([LayerGate(config.hidden_size, config.num_key_value_heads, groups) for _ in range(2)]).save(path)
    monkeypatch.setattr(by_name, "load_model", lambda name, **_: (model, ByteTokenizer()))
    monkeypatch.setenv("COLUMNS", "140")
    score_shapes.main(
        contexts=1, tokens=200, task=["hidden_facts"], by_layer=True, gate=path, model="tiny", device="cpu"
    )
    shown = capsys.readouterr().out
    assert "kvzip, surprisal" in shown and "gated, by layer" in shown and "1 contexts of 200 tokens" in shown
    first = next(line for line in shown.splitlines() if line.strip("\u2502 ").startswith("kvzip "))
    assert first.count("1.00") == 4  # with itself: both correlations, pairs in common, heads
