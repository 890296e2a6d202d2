"""Head-level KVzip keeps exactly the heads that its scores and its ratio say, and costs no forward."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kvzip_press import (
    HeadScores,
    KVzipHeadPress,
    KVzipPress,
    RaggedCache,
    compress,
    get_press,
    load_model,
    prefill,
)
from kvzip_press.cli import app
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.models import full_attention_layers
from kvzip_press.prefilling import run_prefill
from kvzip_press.presses.kvzip_head import builtin_texts, export_duo, import_duo, shipped_scores
from kvzip_press.testing import ByteTokenizer, evicted_keys_masked, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog and sleeps"
SIX = HeadScores(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]))


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


def prefilled(model, ids, valid=None):
    return run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid)


def kept_positions(cache) -> list[list[list[int]]]:
    """Row 0's positions by compressed layer and head."""
    return [[p.tolist() for p in cache.kept_positions(layer_idx)[0]] for layer_idx, _ in cache.ragged_layers()]


@pytest.mark.parametrize("values", [torch.ones(5, 3), torch.rand(5, 3).round(decimals=1), torch.rand(5, 3)])
def test_the_number_of_whole_heads_is_exact_at_every_ratio(values) -> None:
    """Also where all scores are equal, where a threshold would keep no head at all."""
    for percent in range(100):
        kept = HeadScores(values).kept_heads(percent / 100)
        assert int(kept.sum()) == round((1 - percent / 100) * 15)
        assert not kept.any() or kept.all() or values[kept].min() >= values[~kept].max()


def test_ties_go_to_the_lower_layer_and_then_the_lower_head() -> None:
    values = torch.tensor([[0.5, 1.0], [0.5, 0.5], [1.0, 0.5]])
    expected = torch.tensor([[True, True], [True, False], [True, False]])
    assert torch.equal(HeadScores(values).kept_heads(1 / 3), expected)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("window_size", [0, 7])
def test_kept_heads_are_whole_and_the_others_keep_sink_and_window(architecture, window_size) -> None:
    """Hybrid models have scores for their full-attention layers only."""
    model = tiny_model(architecture)
    done = prefilled(model, token_ids(1, 50))
    scores = HeadScores(SIX.values[: len(done.blank_scores())])
    cache = done.evict(KVzipHeadPress(0.5, scores, window_size=window_size).score(done))
    short = [*range(4), *range(50 - window_size, 50)]
    for kept, layer in zip(scores.kept_heads(0.5).tolist(), kept_positions(cache), strict=True):
        assert layer == [list(range(50)) if whole else short for whole in kept]


@pytest.mark.parametrize("left", [True, False])
def test_rows_of_a_padded_batch_keep_what_they_keep_alone(left) -> None:
    model, press = tiny_model(), KVzipHeadPress(0.5, SIX, window_size=6)
    ids, valid = token_ids(2, 45), torch.ones(2, 45, dtype=torch.bool)
    valid[1, : 14 if left else None] = left is False
    if not left:
        valid[1, 31:] = False
    together = prefilled(model, ids, valid)
    together = together.evict(press.score(together))
    alone = prefilled(model, ids[1:, valid[1]])
    alone = alone.evict(press.score(alone))
    for layer_idx, _ in alone.ragged_layers():
        for one, other in zip(together.kept_positions(layer_idx)[1], alone.kept_positions(layer_idx)[0], strict=True):
            assert one.tolist() == other.tolist()
    assert [len(head) for head in together.kept_positions(0)[1]] == [10, 31]


def test_logits_equal_those_with_the_dropped_pairs_masked() -> None:
    model, ids = tiny_model(), token_ids(1, 40)
    done = prefilled(model, ids[:, :30])
    cache = done.evict(KVzipHeadPress(0.5, SIX, n_sink=0, window_size=5).score(done))
    whole = SIX.kept_heads(0.5)[:, :, None] | (torch.arange(30) >= 25)
    with torch.no_grad():
        got = model(ids[:, 30:], past_key_values=cache).logits
        with evicted_keys_masked(model, {i: kept[None] for i, kept in enumerate(whole)}):
            expected = model(ids[:, 30:], past_key_values=done.cache).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_layer_may_lose_its_whole_context() -> None:
    """Without sink and window, at a ratio that leaves no head, the model goes on from its own tail."""
    model, ids = tiny_model(), token_ids(1, 30)
    with torch.no_grad(), KVzipHeadPress(0.99, SIX, n_sink=0)(model):
        cache = model(ids).past_key_values
        logits = model(ids[:, :1], past_key_values=cache).logits
    assert RaggedCache.of(cache).kept_fraction == pytest.approx(1 / 31)
    assert torch.isfinite(logits).all()


def test_of_a_later_turn_dropped_heads_keep_the_window_only() -> None:
    model, ids = tiny_model(), token_ids(1, 60)
    with torch.no_grad(), KVzipHeadPress(0.5, SIX, window_size=3)(model):
        cache = model(ids[:, :40]).past_key_values
        model(ids[:, 40:], past_key_values=cache)
    kept = kept_positions(RaggedCache.of(cache))
    assert kept[0] == [[0, 1, 2, 3, 37, 38, 39, 57, 58, 59], list(range(60))]


def test_resident_bytes_follow_the_whole_heads() -> None:
    model = tiny_model(head_dim=64)
    done = prefilled(model, token_ids(1, 4096))
    cache = done.evict(KVzipHeadPress(0.5, SIX).score(done))
    assert cache.kept_fraction == pytest.approx(0.5 + 0.5 * 4 / 4096)
    assert cache.resident_bytes / cache.dense_bytes == pytest.approx(cache.kept_fraction, rel=0.02)
    for _, layer in cache.ragged_layers():
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in layer.tensors)


def test_compression_runs_no_forward() -> None:
    """Reading the context is the only forward of the decoder; KVzip itself runs more."""
    model, calls = tiny_model(), []
    full_attention_layers(model)[0].module.register_forward_hook(lambda *_: calls.append(1))
    compress(model, TOKENIZER, TEXT, KVzipHeadPress(0.5, SIX))
    assert len(calls) == 1
    compress(model, TOKENIZER, TEXT, KVzipPress(0.5))
    assert len(calls) > 2


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_computed_scores_are_the_maximum_of_kvzips(architecture) -> None:
    """Over the tokens outside the protected prefix, and over the texts."""
    model, texts, seen = tiny_model(architecture), [TEXT, TEXT[::-1] * 2], []
    computed = HeadScores.compute(model, TOKENIZER, texts, 32, progress=lambda done, total: seen.append((done, total)))
    expected = []
    for text in texts:
        done = prefill(model, TOKENIZER, text)
        layers = KVzipPress(0.0, chunk_size=32).score(done).layers
        expected.append(torch.stack([v[0, :, done.prefix_length :].amax(dim=-1) for v in layers.values()]))
    assert torch.equal(computed.values, torch.maximum(*expected))
    assert computed.layer_indices == tuple(done.blank_scores())
    assert seen == [(i, 8) for i in range(1, 9)]
    assert [text["tokens"] for text in json.loads(computed.provenance["texts"])] == [len(text) for text in texts]
    one, two = (HeadScores.compute(model, TOKENIZER, [text], 32) for text in texts)
    assert torch.equal(one.merged([two]).values, computed.values)
    assert one.merged([two]).provenance["texts"] == computed.provenance["texts"]


def test_files_hold_what_was_saved(tmp_path) -> None:
    model, path = tiny_model("gemma3_text"), tmp_path / "new" / "scores.safetensors"
    scores = HeadScores.compute(model, TOKENIZER, [TEXT])
    scores.save(path)
    again = HeadScores.load(path)
    assert torch.equal(again.values, scores.values)
    assert (again.layer_indices, again.provenance) == (scores.layer_indices, scores.provenance)
    assert list(path.parent.iterdir()) == [path]
    done = prefill(model, TOKENIZER, TEXT)
    press = get_press("kvzip_head", 0.5, scores=path)
    assert kept_positions(done.evict(press.score(done)))[0][0] in ([0], list(range(len(TEXT) + 1)))


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 2), (1, 3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kvzips_files_are_read(tmp_path, shape, dtype) -> None:
    torch.save(SIX.values.to(dtype).view(shape), tmp_path / "one.pt")
    torch.save(SIX.values.flip(0).to(dtype), tmp_path / "two.pt")
    one, two = (HeadScores.from_kvzip(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert torch.equal(one.values, SIX.values.to(dtype).float())
    assert torch.equal(one.merged([two]).values, torch.maximum(one.values, two.values))
    assert KVzipHeadPress(0.5, tmp_path / "one.pt").head_scores(tiny_model()).values.shape == (3, 2)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path) -> None:
    torch.save(Malicious(tmp_path / "made"), tmp_path / "bad.pt")
    with pytest.raises(InvalidArgumentError, match="expected one floating-point tensor"):
        HeadScores.from_kvzip(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("held", [{"a": torch.ones(3, 2)}, torch.ones(6), torch.ones(2, 3, 2), torch.ones(3, 2).int()])
def test_other_content_of_pt_files_is_refused(tmp_path, held) -> None:
    torch.save(held, tmp_path / "other.pt")
    with pytest.raises(InvalidArgumentError, match=r"expected one floating-point tensor \[layers, heads\]"):
        HeadScores.from_kvzip(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["scores.pt", "scores.safetensors"])
def test_torn_and_absent_files_are_refused(tmp_path, name) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        HeadScores.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a file of scores")
    with pytest.raises(InvalidArgumentError, match="expected"):
        HeadScores.load(tmp_path / name)


@pytest.mark.parametrize(
    "values", [torch.ones(3), torch.ones(0, 2), torch.ones(3, 2).long(), torch.tensor([[1.0, torch.nan]])]
)
def test_values_that_are_no_scores_are_refused(values) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        HeadScores(values)


@pytest.mark.parametrize("shape", [(2, 2), (3, 4), (4, 2)])
def test_scores_of_another_shape_are_refused(shape) -> None:
    done = prefilled(tiny_model(), token_ids(1, 20))
    with pytest.raises(InvalidArgumentError, match=r"expected head scores \(3, 2\).*got"):
        KVzipHeadPress(0.5, HeadScores(torch.ones(shape))).score(done)
    with pytest.raises(InvalidArgumentError, match="scores of one model"):
        SIX.merged([HeadScores(torch.ones(shape))])


def test_scores_of_other_layers_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="expected scores of the layers"):
        HeadScores(torch.ones(2, 2), (0, 1)).check(tiny_model("gemma3_text"))


@pytest.mark.parametrize(
    "options", [{"n_sink": -1}, {"window_size": -1}, {"compression_ratio": 1.0}, {"scores": 3}, {"budget": 64}]
)
def test_bad_options_are_refused(options) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        KVzipHeadPress(**options)


@pytest.mark.parametrize("texts", [[], "one text", [""]])
def test_nothing_to_read_is_refused(texts) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        HeadScores.compute(tiny_model(), TOKENIZER, texts)


def test_another_ratio_is_not_asked_of_decided_scores() -> None:
    done = prefilled(tiny_model(), token_ids(1, 20))
    scores = KVzipHeadPress(0.5, SIX).score(done)
    with pytest.raises(InvalidArgumentError, match="decides its own budget"):
        done.evict(scores, 0.7)


def test_a_model_without_shipped_scores_is_told_how_to_make_them() -> None:
    done = prefilled(tiny_model(), token_ids(1, 20))
    with pytest.raises(InvalidArgumentError, match="kvzip-press heads compute"):
        KVzipHeadPress(0.5).score(done)


def test_a_duo_attention_pattern_comes_back_as_it_went(tmp_path) -> None:
    export_duo(SIX, tmp_path / "pattern", sink_size=64, recent_size=128)
    scores, sink_size, recent_size = import_duo(tmp_path / "pattern")
    assert torch.equal(scores.values, SIX.values) and (sink_size, recent_size) == (64, 128)
    read = np.loadtxt(tmp_path / "pattern" / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    assert np.array_equal(read, SIX.values.double().numpy())


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_a_pattern_of_one_row_or_column_keeps_its_shape_and_is_clipped(tmp_path, shape) -> None:
    export_duo(HeadScores(torch.tensor([-0.01, 0.2, 1.0, 1.5]).view(shape)), tmp_path)
    assert torch.equal(import_duo(tmp_path)[0].values, torch.tensor([0.0, 0.2, 1.0, 1.0]).view(shape))


@pytest.mark.parametrize(
    ("heads", "config"),
    [("a\tb", '{"sink_size": 1, "recent_size": 1}'), ("1\t0", "{}"), ("1\t0", "no"), ("1\t0\n1", "{}"), (None, "{}")],
)
def test_what_is_no_pattern_is_refused(tmp_path, heads, config) -> None:
    if heads is not None:
        (tmp_path / "full_attention_heads.tsv").write_text(heads)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidArgumentError, match="expected"):
        import_duo(tmp_path)


@pytest.fixture
def invoke(monkeypatch):
    """Runs ``kvzip-press heads ...`` on a tiny model and returns what it printed."""
    monkeypatch.setattr("kvzip_press.loading.load_model", lambda name: (tiny_model(name), TOKENIZER))

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["heads", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output.replace("\n", " ")

    return run


def test_the_command_computes_exports_and_imports(invoke, tmp_path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in texts:
        path.write_text(path.name + TEXT)
    out, again, pattern = tmp_path / "scores.safetensors", tmp_path / "again.safetensors", tmp_path / "pattern"
    said = invoke("compute", "--model", "llama", "--text", texts[0], "--text", texts[1], "--out", out)
    assert "3 layers of 2 heads" in said
    expected = HeadScores.compute(tiny_model(), TOKENIZER, [path.read_text() for path in texts])
    assert torch.equal(HeadScores.load(out).values, expected.values)
    invoke("export", "--format", "duo-attention", "--scores", out, "--out", pattern, "--recent-size", 64)
    assert "n_sink=128, window_size=64" in invoke("import", "--folder", pattern, "--out", again)
    assert torch.equal(HeadScores.load(again).values, expected.values)
    with pytest.raises(InvalidArgumentError, match="expected --format"):
        invoke("export", "--format", "other", "--scores", out, "--out", pattern)


def test_without_texts_the_command_reads_the_built_in_ones(invoke, tmp_path) -> None:
    out = tmp_path / "scores.safetensors"
    assert "code, prose" in invoke("compute", "--model", "llama", "--out", out)
    read = json.loads(HeadScores.load(out).provenance["texts"])
    assert [text["tokens"] for text in read] == [len(TOKENIZER.encode(text)) for text in builtin_texts().values()]


@pytest.mark.embedded
def test_the_embedded_model_has_shipped_scores_and_other_weights_of_its_shape_have_none() -> None:
    model, tokenizer = load_model("smollm2")
    scores = shipped_scores(model)
    assert scores.values.shape == (30, 3) and scores.values.min() > 0 and scores.values.max() <= 1
    cache = compress(model, tokenizer, TEXT, KVzipHeadPress(0.4))
    lengths = torch.stack([cache.seqlens(layer_idx)[0] for layer_idx, _ in cache.ragged_layers()])
    assert int((lengths == lengths.max()).sum()) == 54
    read = [len(tokenizer.encode(text)) for text in builtin_texts().values()]
    assert [text["tokens"] for text in json.loads(scores.provenance["texts"])] == read
    with torch.no_grad():
        model.model.layers[7].self_attn.k_proj.weight.mul_(1.02)
    with pytest.raises(InvalidArgumentError, match="only those of other weights of this shape"):
        shipped_scores(model)
