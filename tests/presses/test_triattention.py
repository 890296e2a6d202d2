"""TriAttention keeps what its formula keeps, from a file that is the model's, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import decode_oracles as oracles
import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from kvzip_press import get_press
from kvzip_press.cache.pair_pool.worth import STAYS
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cli.main import app
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.presses.decoding import QueryStatistics, TriAttentionPress, calibrate_queries
from kvzip_press.presses.decoding.triattention.tri_press import tri_scores
from kvzip_press.testing import ByteTokenizer, tiny_model

TEXTS = ["a first text, of which the model's queries are taken", "and another one that is shorter"]

pytestmark = pytest.mark.usefixtures("one_thread")


def distinct_ids(length: int) -> torch.Tensor:
    """No token twice: equal tokens would tie."""
    return 3 + torch.randperm(250, generator=torch.Generator().manual_seed(0))[None, :length]


@torch.no_grad()
def step(model: Any, cache: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True)


def held_by(cache: Any, row: int = 0) -> list[list[int]]:
    layer = cache.layers[0]
    assert isinstance(layer, RaggedLayer)
    end, n = int(layer.next_positions[row]), int(layer.n_tail_tokens[row])
    return [layer.packed.head_positions(row, head).tolist() + list(range(end - n, end)) for head in range(2)]


def before_rope(turned: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Complex ``[heads, n, head_dim / 2]`` in fp64, of tokens at positions 0 to n - 1; Llama pairs i with d / 2 + i."""
    points = torch.complex(*turned.double().chunk(2, dim=-1))
    angles = torch.outer(torch.arange(turned.shape[1], dtype=torch.float64), frequencies)
    return points * torch.polar(torch.ones_like(angles), -angles)


def frequencies(theta: float = 10000.0, dim: int = 16) -> torch.Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def formula(means: torch.Tensor, magnitudes: torch.Tensor, normalize: bool) -> oracles.Worth:
    """The score pair by pair and distance by distance, with cosines, as in the paper; keys are turned back."""

    ahead = torch.tensor([2.0**power for power in range(17)], dtype=torch.float64)

    def worth(oracle: oracles.Oracle, head: int, alive: list[int], queries: range) -> list[float]:
        keys = before_rope(oracle.text.keys[head, None], frequencies())[0, alive]
        distances = alive[-1] + 1 - torch.tensor(alive, dtype=torch.float64)
        of_group = []
        for query in range(head * oracle.text.groups, (head + 1) * oracle.text.groups):
            mean, size = means[query], magnitudes[query]
            angles = (distances[:, None] + ahead)[..., None] * frequencies() + (mean.angle() - keys.angle())[:, None]
            logits = (mean.abs() * keys.abs()[:, None] * angles.cos()).sum(dim=-1)
            score = logits.mean(dim=1) + ((size - mean.abs()) * keys.abs()).sum(dim=1)
            if normalize:
                score = (score - score.mean()) / score.std(unbiased=False)
            of_group.append(score)
        return torch.stack(of_group).amax(dim=0).tolist()

    return worth


def means_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.tensor([ByteTokenizer().encode(text)]) for text in TEXTS]
    seen = torch.cat([before_rope(oracles.Text.read_by(model, ids).queries, frequencies()) for ids in rows], dim=1)
    return seen.mean(dim=1), seen.abs().mean(dim=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=1, vocab_size=256)


@pytest.fixture(scope="module")
def statistics(model: Any) -> QueryStatistics:
    return calibrate_queries(model, ByteTokenizer(), TEXTS)


def test_means_are_those_of_the_queries_before_rope(model, statistics) -> None:
    means, magnitudes = means_of(model)
    torch.testing.assert_close(
        torch.view_as_complex(statistics.centres)[0], means.to(torch.complex64), atol=2e-5, rtol=0
    )
    torch.testing.assert_close(statistics.magnitudes[0], magnitudes.float(), atol=2e-5, rtol=0)
    assert statistics.layouts == ("halves",) and statistics.layer_indices == (0,)
    torch.testing.assert_close(statistics.frequencies, frequencies(), atol=0, rtol=1e-6)


@pytest.mark.parametrize(("normalize", "buffer"), [(True, 1), (True, 10), (False, 10)])
def test_what_is_kept_is_what_the_formula_keeps(model, statistics, normalize, buffer) -> None:
    """Behind the prompt and behind each token: by the distance that pairs have at each eviction."""
    ids = distinct_ids(75)
    worth = formula(*means_of(model), normalize)
    oracle = oracles.Oracle(oracles.Text.read_by(model, ids), worth, budget=24, buffer=buffer, recent=2)
    expected = oracle.keep(prompt=40, length=75 if buffer > 1 else 55)
    cache = DynamicCache(config=model.config)
    with TriAttentionPress(budget=24, buffer=buffer, n_recent=2, queries=statistics, normalize=normalize)(model):
        step(model, cache, ids[:, :40])
        assert held_by(cache) == expected[0]
        for token, kept in enumerate(expected[1:], start=40):
            step(model, cache, ids[:, token : token + 1])
            assert held_by(cache) == kept, token
    assert all(layer.tail.window is None for layer in cache.layers), "no query is kept"


def pairs_of(keys: torch.Tensor, end: int, scores: torch.Tensor | None = None) -> LayerPairs:
    n = keys.shape[2]
    return LayerPairs(
        0,
        keys,
        torch.ones(1, 2, n, dtype=torch.bool),
        torch.arange(n).expand(1, 2, n),
        torch.zeros(1, 2, n) if scores is None else scores,
        torch.tensor([end]),
        torch.empty(1, 4, 0, 16),
        torch.empty(1, 0, dtype=torch.bool),
    )


def test_pairs_that_stay_are_left_out_of_what_is_made_comparable(statistics) -> None:
    """Centre and deviation are those of the pairs that compete, whatever a protected prompt holds."""
    press, generator = TriAttentionPress(budget=24, buffer=4, queries=statistics), torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 30, 16, generator=generator)
    stays = torch.cat([torch.full((1, 2, 10), STAYS), torch.zeros(1, 2, 20)], dim=2)
    alone = press.worth(pairs_of(keys[:, :, 10:], 30))
    beside = press.worth(pairs_of(torch.cat([9 * keys[:, :, :10], keys[:, :, 10:]], dim=2), 30, stays))
    torch.testing.assert_close(beside[:, :, 10:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "options"), [("phi3", {"partial_rotary_factor": 0.5}), ("qwen3", {})])
def test_the_mean_query_s_logit_is_that_of_a_query(architecture, options) -> None:
    """Of one token that is read alone, the mean query is its query: its score is the logit, also in channels that RoPE
    leaves, and with norms of queries; nothing is added, since the mean is as long as the query.
    """
    model = tiny_model(architecture, num_layers=1, vocab_size=256, **options)
    found = calibrate_queries(model, ByteTokenizer(), ["e"])
    ids = torch.tensor([[*range(5, 25), *ByteTokenizer().encode("e")]])
    text = oracles.Text.read_by(model, ids)
    n = ids.shape[1]
    pairs = pairs_of(text.keys[None].float(), n - 2)
    got = tri_scores(pairs, found, max_offset=1)[0]  # of the query one position behind the end: the last token's
    logits = [text.logits(head, n - 1, list(range(n))) * 16**0.5 for head in range(2)]
    torch.testing.assert_close(got.double(), torch.stack(logits), atol=1e-3, rtol=1e-3)


def test_a_file_gives_the_same_statistics_back(statistics, tmp_path) -> None:
    statistics.save(tmp_path / "queries.safetensors")
    read = QueryStatistics.load(tmp_path / "queries.safetensors")
    assert all(torch.equal(getattr(read, name), getattr(statistics, name)) for name in ("centres", "magnitudes"))
    assert torch.equal(read.frequencies, statistics.frequencies)
    assert read.provenance == {name: str(value) for name, value in statistics.provenance.items()}
    assert (read.layouts, read.layer_indices) == (statistics.layouts, statistics.layer_indices)


def test_files_that_are_not_those_of_the_model_are_refused(model, statistics, tmp_path) -> None:
    """Other weights, other layers, another RoPE, damage, another kind of file, none at all."""
    path = tmp_path / "queries.safetensors"
    statistics.save(path)
    press = TriAttentionPress(budget=24, buffer=4, queries=path)
    press.requires(model)
    with pytest.raises(InvalidArgumentError, match="other weights"):
        press.requires(tiny_model(num_layers=1, vocab_size=256, seed=1))
    with pytest.raises(InvalidArgumentError, match="num_hidden_layers"):
        press.requires(tiny_model(num_layers=2, vocab_size=256))
    anonymous = replace(press, queries=replace(statistics, provenance={}))
    with pytest.raises(InvalidArgumentError, match="layers, heads, head_dim / 2"):
        anonymous.requires(tiny_model(num_layers=2, vocab_size=256))
    turning = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(InvalidArgumentError, match="other frequencies"):
        anonymous.requires(tiny_model(num_layers=1, vocab_size=256, rope_scaling=turning))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InvalidArgumentError, match="changed or damaged"):
        QueryStatistics.load(path)
    with pytest.raises(InvalidArgumentError, match="queries calibrate"):
        QueryStatistics.load(Path(__file__))
    with pytest.raises(InvalidArgumentError, match="queries=FILE"):
        TriAttentionPress(budget=24, buffer=4).requires(model)


def test_a_rope_whose_frequencies_are_not_fixed_is_refused(statistics) -> None:
    changing = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny_model(num_layers=1, vocab_size=256, rope_scaling=changing)
    with pytest.raises(UnsupportedModelError, match="TriAttentionPress: expected a model whose RoPE"):
        calibrate_queries(model, ByteTokenizer(), TEXTS)
    press = TriAttentionPress(budget=24, buffer=4, queries=replace(statistics, provenance={}))
    with pytest.raises(UnsupportedModelError, match="TriAttentionPress: expected a model whose RoPE"):
        press.requires(model)


@pytest.mark.parametrize("options", [{"max_offset": 0}, {"n_recent": -1}, {"queries": "no/such/file"}])
def test_values_out_of_range_are_refused(options) -> None:
    with pytest.raises(InvalidArgumentError):
        TriAttentionPress(budget=64, **options)


def test_statistics_that_do_not_fit_each_other_are_refused(statistics) -> None:
    for wrong in (
        {"magnitudes": statistics.magnitudes[:, :1]},
        {"centres": statistics.centres * torch.nan},
        {"layouts": ("quarters",)},
        {"layer_indices": (0, 1)},
        {"frequencies": torch.ones(9)},
    ):
        with pytest.raises(InvalidArgumentError):
            replace(statistics, **wrong)


def test_the_command_writes_what_the_function_returns(model, statistics, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("kvzip_press.loading.by_name.load_model", lambda name, **_: (model, ByteTokenizer()))
    words = ["--model", "tiny", "--out", str(tmp_path / "queries.safetensors")]
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        words += ["--text", str(tmp_path / f"{number}.txt")]
    done = CliRunner().invoke(app, ["queries", "calibrate", *words], catch_exceptions=False)
    assert done.exit_code == 0 and "as long as queries are on average. These are few" in done.output
    assert torch.equal(QueryStatistics.load(tmp_path / "queries.safetensors").centres, statistics.centres)


def test_the_command_refuses_at_once_what_it_could_not_write(tmp_path) -> None:
    """Before a model is loaded; a text that it reads is never what it writes."""
    text = tmp_path / "answers.txt"
    text.write_text("an answer", encoding="utf-8")
    for out, reason in (
        (text, "another file than --text"),
        (tmp_path, "which is a folder"),
        (text / "new", "is no folder"),
    ):
        words = ["--model", "no such model", "--text", str(text), "--out", str(out)]
        with pytest.raises(InvalidArgumentError, match=reason):
            CliRunner().invoke(app, ["queries", "calibrate", *words], catch_exceptions=False)
    assert text.read_text(encoding="utf-8") == "an answer" and [*tmp_path.iterdir()] == [text]


@pytest.mark.embedded
def test_the_embedded_model_has_its_statistics() -> None:
    """Found by its weights, so the press needs nothing but a budget."""
    from kvzip_press import load_model

    model, _ = load_model("smollm2")
    get_press("triattention", budget=64).requires(model)
