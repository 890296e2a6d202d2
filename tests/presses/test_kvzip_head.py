"""Head-level KVzip keeps exactly the heads that its scores and its ratio say, and costs no forward."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
import torch

from kvzip_press import (
    HeadScores,
    KVzipHeadPress,
    KVzipPress,
    RaggedCache,
    Scores,
    compress,
    get_press,
    load_model,
    prefill,
)
from kvzip_press.errors import CacheFileError, InvalidArgumentError
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.presses.kvzip_head import builtin_texts, compute_head_scores
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


def test_a_larger_ratio_drops_more_of_the_same_heads() -> None:
    scores = HeadScores(torch.rand(5, 3).round(decimals=1))
    kept = [scores.kept_heads(percent / 100) for percent in range(100)]
    assert all(bool((more >= fewer).all()) for more, fewer in pairwise(kept))


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
@pytest.mark.parametrize("n_last", [0, 8])
@pytest.mark.parametrize("n_best", [1, 5])
def test_computed_scores_are_the_best_of_kvzips(architecture, n_last, n_best) -> None:
    """Over the tokens between the protected prefix and the last ones, and the mean over the texts."""
    model, texts, seen = tiny_model(architecture), [TEXT, TEXT[::-1] * 2], []
    computed = compute_head_scores(
        model, TOKENIZER, texts, chunk_size=32, n_last=n_last, n_best=n_best, progress=lambda *at: seen.append(at)
    )
    expected = []
    for text in texts:
        done = prefill(model, TOKENIZER, text)
        layers = KVzipPress(0.0, chunk_size=32).score(done).layers
        counted = slice(done.prefix_length, done.valid.shape[1] - n_last)
        expected.append(
            torch.stack([v[0, :, counted].sort(dim=-1).values[:, -n_best:].mean(dim=-1) for v in layers.values()])
        )
    torch.testing.assert_close(
        computed.values, torch.stack(expected).mean(dim=0), rtol=0, atol=5e-7
    )  # two orders of a sum
    assert computed.layer_indices == tuple(done.blank_scores())
    assert seen == [(i, 8) for i in range(1, 9)]
    assert [text["tokens"] for text in json.loads(computed.provenance["texts"])] == [len(text) for text in texts]


def test_tokens_that_the_replays_prompt_follows_upon_do_not_count(monkeypatch) -> None:
    """A head that only looks at what was just read gives the last token its best score: no reason to keep the head.

    SmolLM2 has thirty such heads of ninety.
    """
    model = tiny_model()
    monkeypatch.setattr(KVzipPress, "score", last_token_best)
    with_last, without = (compute_head_scores(model, TOKENIZER, [TEXT], n_last=n, n_best=1).values for n in (0, 1))
    assert torch.equal(with_last, torch.ones(3, 2))
    assert torch.equal(without, torch.full((3, 2), 0.25))


def last_token_best(press, done) -> Scores:
    layers = {layer_idx: torch.full_like(values, 0.25) for layer_idx, values in done.blank_scores().items()}
    for values in layers.values():
        values[..., -1] = 1.0
    return Scores(layers, done.protected(4), press.policy)


def test_scores_of_several_files_are_merged_by_their_maximum_as_kvzip_does() -> None:
    model, texts = tiny_model(), [TEXT, TEXT[::-1] * 2]
    one, two = (compute_head_scores(model, TOKENIZER, [text], n_last=8) for text in texts)
    assert torch.equal(one.merged([two]).values, torch.maximum(one.values, two.values))
    assert [text["tokens"] for text in json.loads(one.merged([two]).provenance["texts"])] == [len(t) for t in texts]


@pytest.mark.parametrize("fact", ["model_type", "k_proj_norms", "method"])
def test_scores_of_another_model_or_method_are_not_merged(fact) -> None:
    one = compute_head_scores(tiny_model(), TOKENIZER, [TEXT], n_last=8)
    other = HeadScores(one.values, one.layer_indices, {**one.provenance, fact: "other"})
    with pytest.raises(InvalidArgumentError, match=f"differ in {fact}"):
        one.merged([other])


def test_files_hold_what_was_saved(tmp_path) -> None:
    model, path = tiny_model("gemma3_text"), tmp_path / "new" / "scores.safetensors"
    scores = compute_head_scores(model, TOKENIZER, [TEXT], n_last=8)
    scores.save(path)
    again = HeadScores.load(path)
    assert torch.equal(again.values, scores.values)
    assert (again.layer_indices, again.provenance) == (scores.layer_indices, scores.provenance)
    assert list(path.parent.iterdir()) == [path]
    done = prefill(model, TOKENIZER, TEXT)
    press = get_press("kvzip_head", 0.5, scores=path)
    assert kept_positions(done.evict(press.score(done)))[0][0] in ([0, 1, 2, 3], list(range(len(TEXT) + 1)))


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 2), (1, 3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kvzips_files_are_read(tmp_path, shape, dtype) -> None:
    torch.save(SIX.values.to(dtype).view(shape), tmp_path / "one.pt")
    torch.save(SIX.values.flip(0).to(dtype), tmp_path / "two.pt")
    one, two = (HeadScores.from_kvzip(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert torch.equal(one.values, SIX.values.to(dtype).float())
    assert torch.equal(one.merged([two]).values, torch.maximum(one.values, two.values))
    assert KVzipHeadPress(0.5, tmp_path / "one.pt").head_scores(tiny_model()).values.shape == (3, 2)


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1), (1, 4, 1, 1)])
def test_kvzips_files_of_models_with_one_kv_head_keep_their_shape(tmp_path, shape) -> None:
    torch.save(torch.rand(shape), tmp_path / "one.pt")
    assert HeadScores.from_kvzip(tmp_path / "one.pt").values.shape == (4, 1)


def test_shipped_scores_are_found_by_weights_whatever_the_model_is_called(tmp_path) -> None:
    """Two models of one shape have files of their own; a third has none, and is told so."""
    models = [tiny_model(seed=seed) for seed in range(3)]
    for number, model in enumerate(models[:2]):
        model.config.name_or_path = f"/somewhere/model-{number}"
        made = compute_head_scores(model, TOKENIZER, [TEXT], n_last=8)
        assert made.provenance["model"] == f"model-{number}"
        made.save(tmp_path / f"any-name-{1 - number}.safetensors")
        model.config.name_or_path = "org/another-name"
    for model in models[:2]:
        expected = compute_head_scores(model, TOKENIZER, [TEXT], n_last=8)
        assert torch.equal(HeadScores.shipped(tmp_path, model).values, expected.values)
    with pytest.raises(InvalidArgumentError, match=r"only those of other weights of this shape \(model-1, model-0\)"):
        HeadScores.shipped(tmp_path, models[2])
    with pytest.raises(InvalidArgumentError, match="got none"):
        HeadScores.shipped(tmp_path, tiny_model("qwen2"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    SIX.save(tmp_path / "scores.safetensors")
    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(CacheFileError, match=r"expected to write .*scores.safetensors"):
        HeadScores(torch.zeros(3, 2)).save(tmp_path / "scores.safetensors")
    assert torch.equal(HeadScores.load(tmp_path / "scores.safetensors").values, SIX.values)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


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


@pytest.mark.parametrize(("texts", "n_last"), [([], 0), ("one text", 0), ([""], 0), ([TEXT], len(TEXT)), ([TEXT], -1)])
def test_nothing_to_read_is_refused(texts, n_last) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        compute_head_scores(tiny_model(), TOKENIZER, texts, n_last=n_last)


def test_another_ratio_is_not_asked_of_decided_scores() -> None:
    done = prefilled(tiny_model(), token_ids(1, 20))
    scores = KVzipHeadPress(0.5, SIX).score(done)
    with pytest.raises(InvalidArgumentError, match="decides its own budget"):
        done.evict(scores, 0.7)


def test_a_model_without_shipped_scores_is_told_how_to_make_them() -> None:
    done = prefilled(tiny_model(), token_ids(1, 20))
    with pytest.raises(InvalidArgumentError, match="kvzip-press heads compute"):
        KVzipHeadPress(0.5).score(done)


@pytest.mark.embedded
def test_the_embedded_model_has_shipped_scores_and_other_weights_of_its_shape_have_none() -> None:
    model, tokenizer = load_model("smollm2")
    scores = KVzipHeadPress().head_scores(model)
    assert scores.values.shape == (30, 3) and scores.values.min() > 0 and scores.values.max() <= 1
    cache = compress(model, tokenizer, TEXT, KVzipHeadPress(0.4))
    lengths = torch.stack([cache.seqlens(layer_idx)[0] for layer_idx, _ in cache.ragged_layers()])
    assert int((lengths == lengths.max()).sum()) == 54
    read = [len(tokenizer.encode(text)) for text in builtin_texts().values()]
    assert [text["tokens"] for text in json.loads(scores.provenance["texts"])] == read
    with torch.no_grad():
        model.model.layers[7].self_attn.k_proj.weight.mul_(1.02)
    with pytest.raises(InvalidArgumentError, match="only those of other weights of this shape"):
        KVzipHeadPress().head_scores(model)
