"""DuoAttention: streaming heads keep sink and recent tokens and no more; patterns are read; scores are kvpress's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvzip_press import DuoAttentionPress, HeadScores, KVzipHeadPress, RaggedCache, get_press, load_model
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.presses.duo_attention import compute_head_scores, export_duo, import_duo
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog and sleeps"
SIX = HeadScores(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]))


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


def prefilled(model, ids, valid=None):
    return run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid)


def positions(cache, layer_idx: int, row: int = 0) -> list[list[int]]:
    return [head.tolist() for head in cache.kept_positions(layer_idx)[row]]


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3_text"])
def test_streaming_heads_keep_sink_and_recent_tokens_retrieval_heads_everything(architecture) -> None:
    model = tiny_model(architecture)
    done = prefilled(model, token_ids(1, 60))
    scores = HeadScores(SIX.values[: len(done.blank_scores())])
    cache = done.evict(DuoAttentionPress(0.5, scores, n_sink=12, window_size=20).score(done))
    ends, everything = [*range(12), *range(40, 60)], list(range(60))
    for kept, (layer_idx, _) in zip(scores.kept_heads(0.5).tolist(), cache.ragged_layers(), strict=True):
        assert positions(cache, layer_idx) == [everything if whole else ends for whole in kept]


def test_sink_and_window_are_those_of_the_published_patterns() -> None:
    press = get_press("duo_attention", 0.5, scores=SIX)
    assert isinstance(press, DuoAttentionPress)
    assert (press.n_sink, press.window_size) == (128, 256)


@pytest.mark.parametrize("length", [1, 300, 384, 385])
def test_a_context_no_longer_than_sink_and_window_is_kept_whole(length) -> None:
    done = prefilled(tiny_model(), token_ids(1, length))
    cache = done.evict(DuoAttentionPress(0.5, SIX).score(done))
    assert positions(cache, 0)[1] == list(range(length))
    assert len(positions(cache, 0)[0]) == min(length, 384)


def test_the_sink_is_counted_from_the_first_token_and_the_prefix_is_kept_besides() -> None:
    """A prefix longer than the sink is kept whole, a shorter one lies inside it: no token is counted twice."""
    model = tiny_model()
    for prefix_length, first in ((0, 6), (3, 6), (9, 9)):
        done = prefilled(model, token_ids(1, 40))
        done.prefix_length = prefix_length
        cache = done.evict(DuoAttentionPress(0.5, SIX, n_sink=6, window_size=5).score(done))
        assert positions(cache, 0)[0] == [*range(first), *range(35, 40)]


@pytest.mark.parametrize("left", [True, False])
def test_rows_of_a_padded_batch_keep_what_they_keep_alone(left) -> None:
    model, press = tiny_model(), DuoAttentionPress(0.5, SIX, n_sink=7, window_size=6)
    ids, valid = token_ids(2, 45), torch.ones(2, 45, dtype=torch.bool)
    valid[1, : 14 if left else None] = left is False
    if not left:
        valid[1, 31:] = False
    together = prefilled(model, ids, valid)
    together = together.evict(press.score(together))
    alone = prefilled(model, ids[1:, valid[1]])
    alone = alone.evict(press.score(alone))
    for layer_idx, _ in alone.ragged_layers():
        assert positions(together, layer_idx, 1) == positions(alone, layer_idx)
    assert positions(alone, 0)[0] == [*range(7), *range(25, 31)]


def test_of_a_later_turn_a_streaming_head_keeps_the_window_and_what_is_left_of_the_sink() -> None:
    model, ids = tiny_model(), token_ids(1, 60)
    with torch.no_grad(), DuoAttentionPress(0.5, SIX, n_sink=10, window_size=3)(model):
        cache = model(ids[:, :8]).past_key_values
        model(ids[:, 8:], past_key_values=cache)
    assert positions(RaggedCache.of(cache), 0) == [[*range(10), 57, 58, 59], list(range(60))]


def test_it_frees_what_its_streaming_heads_lose() -> None:
    """Three of six heads keep 384 of 4096 tokens; the bytes go with them."""
    done = prefilled(tiny_model(head_dim=64), token_ids(1, 4096))
    cache = done.evict(DuoAttentionPress(0.5, SIX).score(done))
    assert cache.kept_fraction == pytest.approx(0.5 + 0.5 * 384 / 4096)
    assert cache.resident_bytes / cache.dense_bytes == pytest.approx(cache.kept_fraction, rel=0.02)


def test_the_two_head_presses_differ_in_their_scores_only() -> None:
    """With the same scores, sink and window they keep the same pairs, so that a comparison is one of scores."""
    done = prefilled(tiny_model(), token_ids(1, 50))
    presses = [cls(0.5, SIX, n_sink=4, window_size=9) for cls in (DuoAttentionPress, KVzipHeadPress)]
    one, other = (done.evict(press.score(done)) for press in presses)
    assert [positions(one, i) for i in range(3)] == [positions(other, i) for i in range(3)]


def test_a_pattern_comes_back_as_it_went(tmp_path) -> None:
    export_duo(SIX, tmp_path / "pattern", sink_size=64, recent_size=128)
    scores, sink_size, recent_size = import_duo(tmp_path / "pattern")
    assert torch.equal(scores.values, SIX.values) and (sink_size, recent_size) == (64, 128)
    read = np.loadtxt(tmp_path / "pattern" / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    assert np.array_equal(read, SIX.values.double().numpy())
    press = DuoAttentionPress.of_pattern(tmp_path / "pattern", 0.5)
    assert (press.n_sink, press.window_size, press.compression_ratio) == (64, 128, 0.5)
    assert torch.equal(press.head_scores(tiny_model()).values, SIX.values)


def test_a_pattern_and_kvzips_scores_are_not_merged(tmp_path) -> None:
    """They are numbers of different meaning, though of one shape."""
    export_duo(SIX, tmp_path / "pattern")
    torch.save(SIX.values, tmp_path / "kvzip.pt")
    with pytest.raises(InvalidArgumentError, match="differ in method"):
        HeadScores.load(tmp_path / "kvzip.pt").merged([import_duo(tmp_path / "pattern")[0]])


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


def test_a_pattern_of_another_number_of_layers_is_refused(tmp_path) -> None:
    export_duo(HeadScores(torch.rand(32, 8)), tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"expected head scores \(3, 2\).*got \(32, 8\)"):
        DuoAttentionPress.of_pattern(tmp_path, 0.5).head_scores(tiny_model())


@pytest.mark.kvpress
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_computed_scores_are_kvpresss(architecture, monkeypatch) -> None:
    from kvzip_press.presses.kvpress_adapter.importing import kvpress

    original = kvpress().presses.duo_attention_press
    model, texts = tiny_model(architecture, num_layers=2), [TEXT * 2, TEXT[::-1] * 3]
    monkeypatch.setattr(original, "load_dataset", lambda *args, **kwargs: Books(texts))
    monkeypatch.setattr(original.AutoTokenizer, "from_pretrained", lambda path: Encoding())
    original.cache.clear()
    expected = original.duo_attention_on_the_fly(model, num_samples=len(texts), q_len=60)
    computed = compute_head_scores(model, TOKENIZER, texts, length=60)
    torch.testing.assert_close(computed.values, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    assert computed.values.std() > 0.001  # heads that are told apart, a hundred times the tolerance and more


class Books:
    """As much of a dataset as kvpress asks for: all samples, whatever the seed."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def to_pandas(self):
        return self

    def sample(self, n: int, random_state: int):
        return {"chapter": np.array(self.texts)}


class Ids(dict):
    def to(self, device):
        return self


class Encoding:
    def __call__(self, text: str, return_tensors: str) -> Ids:
        return Ids(input_ids=torch.tensor([TOKENIZER.encode(text)]))


def test_scores_of_hybrid_models_are_those_of_their_full_layers() -> None:
    seen = []
    computed = compute_head_scores(
        tiny_model("gemma3_text"), TOKENIZER, [TEXT] * 2, length=50, progress=lambda *done: seen.append(done)
    )
    assert computed.layer_indices == (1, 3) and computed.values.shape == (2, 2)
    assert seen == [(1, 2), (2, 2)]


def test_a_head_that_looks_far_back_scores_higher() -> None:
    """Keys that only RoPE tells apart: the second group's queries point away from them, and the nearest suit least."""
    model = tiny_model(num_layers=1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.k_proj, attention.q_proj):
            projection.weight.zero_()
            projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))
            projection.bias.view(-1, 16)[:, 3] = 8  # a frequency that turns by a quarter of a turn in 50 tokens
        attention.q_proj.bias.view(-1, 16)[2:, 3] *= -1
    near, far = compute_head_scores(model, TOKENIZER, [TEXT], length=50).values[0]
    assert far > near


@pytest.mark.parametrize(("texts", "length"), [([], 10), (TEXT, 10), ([TEXT], len(TEXT) + 1), ([TEXT], 0)])
def test_too_little_to_read_is_refused(texts, length) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        compute_head_scores(tiny_model(), TOKENIZER, texts, length=length)


def test_attention_of_another_build_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="expected attention with q_proj and k_proj"):
        compute_head_scores(tiny_model("phi3"), TOKENIZER, [TEXT], length=10)


@pytest.mark.embedded
def test_the_embedded_model_has_a_shipped_pattern() -> None:
    model, _ = load_model("smollm2")
    scores = DuoAttentionPress().head_scores(model)
    assert scores.values.shape == (30, 3) and scores.provenance["method"] == "duo-attention on the fly"
    assert not torch.equal(scores.kept_heads(0.5), KVzipHeadPress().head_scores(model).kept_heads(0.5))
