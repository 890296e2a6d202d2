"""Candidates for a better score come from one replay; the best of one seed is looked at again on another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvzip_press import get_press, prefill
from kvzip_press.leaderboard.analysis.statistics import Comparison
from kvzip_press.leaderboard.benchmarks import candidate_scores as scoring
from kvzip_press.leaderboard.benchmarks import candidates
from kvzip_press.leaderboard.rows.results import read_rows
from kvzip_press.loading import by_name
from kvzip_press.testing import ByteTokenizer, tiny_model

TEXT = "the quick brown fox jumps over the lazy dog and the lazy dog does not mind"
GRID = """
model: tiny
seed: 1
compression_ratios: [0.5, 0.8]
tasks: [{task: hidden_facts, contexts: 2, tokens: 300, options: {n_keys: 2, max_new_tokens: 2}}]
presses: [{press: none}]
"""


@pytest.mark.parametrize("replay", ["full", "local"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_two_of_them_are_what_the_press_gives(architecture: str, replay: str) -> None:
    """KVzip's maximum, and the same weighted by surprisal; also with capped logits and in several chunks."""
    model = tiny_model(architecture)
    done = prefill(model, ByteTokenizer(), TEXT)
    found = scoring.candidate_scores(done, replay=replay, chunk_size=30)
    assert list(found) == list(scoring.CANDIDATES)
    for name, weighting in (("kvzip", None), ("surprisal", "surprisal"), ("probability", "probability")):
        expected = get_press("kvzip", replay=replay, chunk_size=30, weighting=weighting).score(done)
        assert torch.equal(found[name].protected, expected.protected)
        for layer_idx, values in expected.layers.items():
            torch.testing.assert_close(found[name].layers[layer_idx], values, atol=2e-5, rtol=1e-4)


def test_what_becomes_of_the_rows() -> None:
    """One head, three rows, of which the second predicts nothing that was surprising; two pairs."""
    shares, nats = torch.tensor([[[0.2, 0.5], [0.9, 0.4], [0.6, 0.1]]]), torch.tensor([3.0, 0.0, torch.inf])
    least = 0.02 / 6.02
    expected = {
        "kvzip": [0.9, 0.5],
        "surprisal": [0.6, 0.5 * 3.02 / 6.02],
        "clamp 3": [0.6, 0.5],
        "floor 0.3": [0.6, 0.5 * 0.65],
        "second": [0.6, 0.4],
        "mean of 2": [0.75, 0.45],
        "mean of 8": [1.7 / 3, 1.0 / 3],
        "mean of all": [1.7 / 3, 1.0 / 3],
        "weighted mean of 2": [(0.6 + 0.2 * 3.02 / 6.02) / 2, (0.5 * 3.02 / 6.02 + 0.1) / 2],
        "clamp 2, mean of 4": [(0.6 + 0.2 + 0.9 * least_of(2.0)) / 3, (0.5 + 0.1 + 0.4 * least_of(2.0)) / 3],
        "root": [0.6, 0.5 * (3.02 / 6.02) ** 0.5],
    }
    assert least_of(6.0) == pytest.approx(least)
    for name, values in expected.items():
        assert scoring.ROW_STATISTICS[name](shares, nats)[0].tolist() == pytest.approx(values), name


def least_of(most: float) -> float:
    """The weight of a row that predicts what is certain; it does not depend on where weights end."""
    return float(scoring._clamped(torch.zeros(()), most, 0.02 / 6.02))


def test_what_becomes_of_the_scores() -> None:
    """Two layers of one head: budgets of one score with the order of another, ranks, ties, neighbours."""
    kvzip = {0: torch.tensor([[[0.9, 0.8, 0.7, 0.1]]]), 1: torch.tensor([[[0.6, 0.5, 0.4, 0.3]]])}
    other = {0: torch.tensor([[[0.1, 0.2, 0.3, 0.05]]]), 1: torch.tensor([[[0.01, 0.02, 0.03, 0.04]]])}

    def mixed(name: str, *layers: dict[int, torch.Tensor]) -> list[list[float]]:
        return [x[0, 0].tolist() for x in scoring.MIXTURES[name].mix(*layers).values()]

    assert mixed("heads of kvzip", kvzip, other) == [
        pytest.approx([0.7, 0.8, 0.9, 0.1]),
        pytest.approx([0.3, 0.4, 0.5, 0.6]),
    ]
    ranks = mixed("mean rank", kvzip, other)
    assert ranks[0] == pytest.approx([(7 + 5) / 7, (6 + 6) / 7, (5 + 7) / 7, (0 + 4) / 7])
    assert mixed("higher rank", kvzip, other)[1] == pytest.approx([4 / 7, 3 / 7, 2 / 7, 3 / 7])
    assert mixed("smooth 3", kvzip)[0] == pytest.approx([0.85, 0.8, 1.6 / 3, 0.4])
    assert mixed("surprisal, largest of 3", other)[0] == pytest.approx([0.2, 0.3, 0.3, 0.3])
    tied = {0: torch.tensor([[[0.995, 1.0]]])}
    assert mixed("ties by surprisal", tied, {0: torch.tensor([[[0.5, 0.2]]])})[0] == pytest.approx(
        [1.0078125, 1.003125]
    )


def test_weights_take_pairs_from_a_head_that_copies() -> None:
    """Why weights alone can lose: they move the budget to heads in which some row looks at any pair.

    Head 0 copies: row i looks at pair i. In head 1 every row looks at every pair a little. Four rows of six predict
    what was expected. Unweighted, the copying head has the six largest scores; weighted, two of them.
    """
    nats = torch.tensor([0.3, 6.0, 0.2, 0.1, 6.0, 0.3])
    shares = torch.stack([torch.eye(6) * 0.9, torch.full((6, 6), 1 / 6)])  # [heads, rows, pairs]
    unweighted, weighted = (scoring.ROW_STATISTICS[name](shares, nats) for name in ("kvzip", "surprisal"))
    within = scoring.MIXTURES["heads of kvzip"].mix({0: unweighted}, {0: weighted})[0]
    copied = [set(x.flatten().argsort(descending=True)[:6].tolist()) & set(range(6)) for x in (unweighted, weighted)]
    assert copied == [set(range(6)), {1, 4}]
    assert within.sort(dim=-1).values.tolist() == unweighted.sort(dim=-1).values.tolist()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the benchmark's commands on a tiny model and grid."""
    monkeypatch.setattr(by_name, "load_model", lambda name, **_: (tiny_model(num_layers=1), ByteTokenizer()))
    monkeypatch.setenv("COLUMNS", "160")
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID, encoding="utf-8")

    def run(*arguments: str):
        added = ["--grid", str(grid), "--device", "cpu"] if arguments[0] == "measure" else []
        return CliRunner().invoke(candidates.app, [*arguments, *added])

    return run


def test_rows_are_made_once_and_compared_on_two_seeds(app, tmp_path: Path) -> None:
    files = [str(tmp_path / f"{seed}.jsonl") for seed in (1, 2)]
    for seed, path in zip("12", files, strict=True):
        some = ["--candidate", "surprisal", "--candidate", "heads of kvzip"]
        for shard in ("0/2", "1/2"):
            done = app("measure", "--seed", seed, "--rows", path, "--shard", shard, *some)
            assert done.exit_code == 0, done.output
    rows = list(read_rows(files[0]))
    assert len(rows) == 2 * 2 * (1 + 3 * 2)  # contexts, questions; the full cache and three candidates at two ratios
    assert {row.press for row in rows} == {"full cache", "kvzip", "surprisal", "heads of kvzip"}
    assert {round(row.kept_fraction, 1) for row in rows} == {1.0, 0.5, 0.2}
    app("measure", "--seed", "1", "--rows", files[0], *some)
    assert list(read_rows(files[0])) == rows
    shown = app("compare", *files, "--choose", "1", "--confirm", "2").output
    assert "seed 1: all candidates" in shown and "heads of kvzip" in shown and "4 questions" in shown


def test_what_the_full_cache_wrote_is_read_in_one_forward(app, tmp_path: Path) -> None:
    """Nothing removed, nothing diverges; the score is the full cache's, whose right answers are the same then."""
    path = str(tmp_path / "rows.jsonl")
    done = app("measure", "--along", "--rows", path, "--candidate", "surprisal", "--removed", "0", "--removed", "0.9")
    assert done.exit_code == 0, done.output
    rows = list(read_rows(path))
    of_full = {(row.sample_id, row.question_id): row.score for row in rows if row.press == "full cache"}
    for row in rows:
        apart = float(row.tags["divergence"])
        assert abs(apart) < 1e-5 if row.compression_ratio == 0 else apart > 1e-4
        assert row.score <= of_full[row.sample_id, row.question_id]
        assert row.compression_ratio or row.score == of_full[row.sample_id, row.question_id]
    apart = candidates.divergences(rows)
    assert apart["kvzip", 0.9] == 1 and apart["surprisal", 0.0] == pytest.approx(1)
    logs = {row.press: [] for row in rows if row.compression_ratio == 0.9}
    for row in rows:
        if row.compression_ratio == 0.9:
            logs[row.press].append(math.log(float(row.tags["divergence"])))
    mean = {press: sum(values) / len(values) for press, values in logs.items()}  # as many questions in each context
    assert apart["surprisal", 0.9] == pytest.approx(math.exp(mean["surprisal"] - mean["kvzip"]))
    shown = " ".join(app("compare", path, "--choose", "1").output.split())
    assert f"{apart['surprisal', 0.9]:.2f} x" in shown


def test_a_seed_does_not_confirm_itself(app, tmp_path: Path) -> None:
    done = app("compare", str(tmp_path / "rows.jsonl"), "--choose", "1", "--confirm", "1")
    assert done.exit_code == 2 and "other contexts to confirm on" in done.output
    with pytest.raises(typer.BadParameter, match="expected a candidate, got 'heads of kvzp'; did you mean"):
        candidates.measure(candidate=["heads of kvzp"])


def test_what_loses_elsewhere_is_not_chosen() -> None:
    def cell(name: str, ratio: float, difference: float) -> Comparison:
        return Comparison(name, ratio, "kvzip", difference, None, 0.5, 0.5, 4)

    bold = [cell("bold", 0.7, -0.04), cell("bold", 0.8, 0.2), cell("bold", 0.9, 0.2)]
    careful = [cell("careful", 0.7, -0.005), cell("careful", 0.8, 0.1), cell("careful", 0.9, 0.0)]
    worse = [cell("worse", 0.7, 0.0), cell("worse", 0.9, -0.1)]
    assert candidates.chosen([*bold, *careful, *worse]) == "careful"
    assert candidates.chosen([*bold, *worse]) is None
