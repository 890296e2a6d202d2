"""A kvpress press wrapped in RaggedPress is a press like any other."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from kvzip_press import RaggedCache, RaggedPress, RandomPress, compress, compress_in_chunks, prefill
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.prefilling.whole import Prefill, run_prefill
from kvzip_press.testing import ByteTokenizer

pytestmark = pytest.mark.kvpress

ONE_OF_EACH_KIND = ["SnapKVPress", "ChunkPress", "AdaKVPress", "FastKVzipPress"]


def read(model: Any, ids: torch.Tensor, *presses: RaggedPress, valid: torch.Tensor | None = None) -> Prefill:
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    return run_prefill(model, ids, valid, observers=presses)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 0.99])
def test_scores_of_one_forward_serve_every_ratio(
    ratio: float, kvpress: Any, tiny_model: Any, context: Any, native: Any, keep_of: Any
) -> None:
    model, ids = tiny_model(), context(151)
    ragged = RaggedPress(kvpress.SnapKVPress(0.3, window_size=16))
    done = read(model, ids, ragged)
    cache = done.evict(ragged.score(done), compression_ratio=ratio)
    other = RaggedPress(kvpress.SnapKVPress(ratio, window_size=16))
    again = read(model, ids, other)
    assert all(map(torch.equal, keep_of(cache), keep_of(again.evict(other.score(again)))))
    expected = native(model, kvpress.SnapKVPress(ratio, window_size=16), ids)
    assert [layer.keys.shape[2] for layer in expected.cache.layers] == [int(cache.seqlens(i)[0, 0]) for i in range(3)]


def test_scores_that_look_at_the_ratio_serve_only_their_own(kvpress: Any, tiny_model: Any, context: Any) -> None:
    ragged = RaggedPress(kvpress.StreamingLLMPress(0.5))
    done = read(tiny_model(), context(), ragged)
    assert done.evict(ragged.score(done), compression_ratio=0.5).kept_fraction == 0.5
    with pytest.raises(InvalidArgumentError, match=r"expected its compression_ratio=0\.5, got 0\.7"):
        done.evict(ragged.score(done), compression_ratio=0.7)


def test_scores_can_be_spent_by_the_core_over_all_heads(kvpress: Any, tiny_model: Any, context: Any) -> None:
    ragged = RaggedPress(kvpress.KnormPress(0.5))
    done = read(tiny_model(), context(), ragged)
    cache = done.evict(ragged.score(done), allocation="global")
    assert cache.kept_fraction == 0.5
    assert len({int(n) for layer in range(3) for n in cache.seqlens(layer).flatten()}) > 1


def test_many_presses_watch_one_forward(tiny_model: Any, make_press: Any, context: Any, keep_of: Any) -> None:
    model, ids = tiny_model(), context()
    presses = [RaggedPress(make_press(name)) for name in ONE_OF_EACH_KIND]
    together = read(model, ids, *presses)
    for press in presses:
        alone = read(model, ids, press)
        expected = alone.evict(press.score(alone))
        assert all(map(torch.equal, keep_of(together.evict(press.score(together))), keep_of(expected)))


@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "KVzipPress"])
def test_every_way_to_use_it_keeps_the_same(
    name: str, tiny_model: Any, make_press: Any, tokenizer_folder: Any, keep_of: Any
) -> None:
    model, tokenizer = tiny_model(), AutoTokenizer.from_pretrained(tokenizer_folder)
    words = " ".join(f"w{i}" for i in torch.randperm(390, generator=torch.Generator().manual_seed(0))[:99].tolist())
    ragged = RaggedPress(make_press(name))
    done = prefill(model, tokenizer, words, observers=[ragged])
    expected = keep_of(done.evict(ragged.score(done)))
    late = prefill(model, tokenizer, words)
    assert all(map(torch.equal, keep_of(late.evict(ragged.score(late))), expected))
    assert all(map(torch.equal, keep_of(compress(model, tokenizer, words, ragged)), expected))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), ragged(model):
        model(done.input_ids, past_key_values=cache)
    assert all(map(torch.equal, keep_of(RaggedCache.of(cache)), expected))


@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "ChunkKVPress", "CriticalAdaKVPress", "CompactorPress"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_a_row_of_a_batch_keeps_what_it_keeps_alone(
    name: str, side: str, tiny_model: Any, make_press: Any, context: Any
) -> None:
    model, ids = tiny_model(), context(120, batch=3)
    valid = torch.ones_like(ids, dtype=torch.bool)
    if side == "left":
        valid[1, :25], valid[2, :70] = False, False
    elif side == "right":
        valid[1, -25:], valid[2, -70:] = False, False
    ragged = RaggedPress(make_press(name))
    torch.manual_seed(0)
    done = read(model, ids, ragged, valid=valid)
    cache = done.evict(ragged.score(done))
    for row in range(3):
        if name == "CompactorPress":
            torch.manual_seed(0)  # its random sketch
            if row or side != "none":
                continue
        alone = read(model, ids[row][valid[row]][None], ragged)
        expected = alone.evict(ragged.score(alone))
        for layer_idx in range(3):
            kept, alone_kept = cache.kept_positions(layer_idx)[row], expected.kept_positions(layer_idx)[0]
            assert [head.tolist() for head in kept] == [head.tolist() for head in alone_kept]


@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "KVzipPress"])
def test_resident_bytes_are_the_kept_fraction(name: str, tiny_model: Any, make_press: Any, context: Any) -> None:
    ids = context(398).repeat(1, 6)[:, :2048]
    press = make_press(name, 0.7) if name != "FastKVzipPress" else make_press(name, 0.8)
    model = tiny_model(head_dim=64)
    if name == "FastKVzipPress":
        assert press.gates is not None
    ragged = RaggedPress(press)
    done = read(model, ids, ragged)
    done.evict_in_place(ragged.score(done))
    cache = RaggedCache.of(done.cache)
    assert abs(cache.kept_fraction - (1 - ragged.compression_ratio)) < 0.01
    assert cache.resident_bytes / cache.dense_bytes == pytest.approx(cache.kept_fraction, rel=0.02)


def test_compression_ratio_is_known_where_the_press_says_it(kvpress: Any, make_press: Any) -> None:
    by_layer = kvpress.PerLayerCompressionPress(kvpress.KnormPress(), [0.2, 0.4])
    assert RaggedPress(by_layer).compression_ratio == pytest.approx(0.3)
    assert RaggedPress(kvpress.AdaKVPress(kvpress.KnormPress(0.7))).compression_ratio == 0.7
    assert RaggedPress(kvpress.DuoAttentionPress(head_compression_ratio=0.0)).compression_ratio == 0.0
    assert RaggedPress(make_press("ComposedPress")).compression_ratio == pytest.approx(0.6)
    assert math.isnan(RaggedPress(make_press("DMSPress")).compression_ratio)


def test_a_press_that_finds_its_ratio_as_it_goes_reports_it(tiny_model: Any, make_press: Any, context: Any) -> None:
    ragged = RaggedPress(make_press("DMSPress"))
    done = read(tiny_model(), context(), ragged)
    scores = ragged.score(done)
    assert scores.policy.compression_ratio == pytest.approx(1 - done.evict(scores).kept_fraction)


def test_it_is_its_own_key_and_survives_copies(kvpress: Any) -> None:
    press = RaggedPress(kvpress.SnapKVPress(0.5))
    twin = RaggedPress(kvpress.SnapKVPress(0.5))
    assert {press: 1, twin: 2}[press] == 1
    for copied in (copy.deepcopy(press), pickle.loads(pickle.dumps(press))):
        assert copied.compression_ratio == 0.5
        assert repr(copied) == repr(press)
    assert repr(press) == "RaggedPress(SnapKVPress(compression_ratio=0.5, window_size=64, kernel_size=5))"


def test_what_is_no_press_of_kvpress_is_refused(kvpress: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a press of kvpress, got float"):
        RaggedPress(0.5)
    with pytest.raises(InvalidArgumentError, match=r"got the class SnapKVPress: make one, SnapKVPress\(0\.7\)"):
        RaggedPress(kvpress.SnapKVPress)
    with pytest.raises(InvalidArgumentError, match=r"got the text 'snapkv': get_press\(name, 0\.7\)"):
        RaggedPress("snapkv")
    with pytest.raises(InvalidArgumentError, match="got RandomPress, which needs no wrapper"):
        RaggedPress(RandomPress(0.5))
    nested = kvpress.ComposedPress([kvpress.KnormPress(0.5), kvpress.ThinKPress(0.5)])
    with pytest.raises(InvalidArgumentError, match="ThinKPress cannot be made real"):
        RaggedPress(nested)
    with pytest.raises(InvalidArgumentError, match="FastKVzipPress inside ComposedPress would do nothing"):
        RaggedPress(kvpress.ComposedPress([kvpress.FastKVzipPress(0.5)]))


def test_a_press_that_refuses_leaves_the_forward_and_other_presses_alone(
    kvpress: Any, tiny_model: Any, context: Any
) -> None:
    short, fine = RaggedPress(kvpress.SnapKVPress(0.5)), RaggedPress(kvpress.KnormPress(0.5))
    done = read(tiny_model(), context(20), short, fine)
    with pytest.raises(InvalidArgumentError, match="Query length 20 should be greater than the window size 64"):
        short.score(done)
    assert done.evict(fine.score(done)).kept_fraction == 0.5


def test_a_refusal_leaves_the_users_cache_dense_and_whole(kvpress: Any, tiny_model: Any, context: Any) -> None:
    model, cache, ids = tiny_model(), DynamicCache(), context(20)
    with torch.no_grad():
        model(ids, past_key_values=(expected := DynamicCache()))
        with pytest.raises(InvalidArgumentError, match="window size"), RaggedPress(kvpress.SnapKVPress(0.5))(model):
            model(ids, past_key_values=cache)
    for layer, expected_layer in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(layer.keys, expected_layer.keys)


@pytest.mark.parametrize("name", ["KnormPress", "SnapKVPress", "TOVAPress", "KeyDiffPress"])
def test_what_scores_any_span_reads_in_chunks(name: str, tiny_model: Any, make_press: Any, context: Any) -> None:
    """A later span is scored as kvpress scores it where nothing was evicted before: from its own states and keys."""
    model, press, ids = tiny_model(), RaggedPress(make_press(name)), context(160)
    whole = torch.ones(1, 80, dtype=torch.bool)
    first = run_prefill(model, ids[:, :80], whole)
    second = run_prefill(model, ids[:, 80:], whole, observers=[press], cache=first.evict(RandomPress(0.0).score(first)))
    expected = run_prefill(model, ids, torch.ones(1, 160, dtype=torch.bool))
    for layer_idx, scores in press.score(second).layers.items():
        keys = expected.cache.layers[layer_idx].keys[:, :, 80:]
        if name == "KnormPress":
            torch.testing.assert_close(scores, -keys.norm(dim=-1), atol=1e-4, rtol=1e-4)
        assert scores.shape == keys.shape[:3] and scores.std() > 0
    tokenizer = ByteTokenizer()
    cache = compress_in_chunks(model, tokenizer, ids[0].tolist(), press, chunk_size=70, window_size=20)
    assert cache.kept_fraction == pytest.approx(0.4, abs=0.01)


def test_what_counts_from_the_beginning_cannot_read_in_chunks(tiny_model: Any, make_press: Any, context: Any) -> None:
    press = RaggedPress(make_press("ExpectedAttentionPress"))
    with pytest.raises(InvalidArgumentError, match="read in one forward"):
        compress_in_chunks(tiny_model(), ByteTokenizer(), context(160)[0].tolist(), press, chunk_size=80)


@pytest.mark.parametrize("name", ["ExpectedAttentionPress", *ONE_OF_EACH_KIND[1:]])
def test_a_later_turn_is_refused(name: str, tiny_model: Any, make_press: Any, context: Any) -> None:
    model, cache = tiny_model(), DynamicCache()
    ragged = RaggedPress(make_press(name))
    with torch.no_grad(), ragged(model):
        model(context(80), past_key_values=cache)
        held = RaggedCache.of(cache).resident_bytes
        with pytest.raises(InvalidArgumentError, match="has seen 80 tokens"):
            model(context(70), past_key_values=cache)
    assert RaggedCache.of(cache).resident_bytes == held
    assert cache.get_seq_length() == 80


def test_a_forward_of_its_own_needs_ids(tiny_model: Any, make_press: Any, context: Any) -> None:
    model = tiny_model()
    embeds = model.get_input_embeddings()(context(60)).detach()
    scorer, own = RaggedPress(make_press("SnapKVPress")), RaggedPress(make_press("FastKVzipPress"))
    with torch.no_grad(), scorer(model):
        model(inputs_embeds=embeds, past_key_values=(cache := DynamicCache()))
    assert RaggedCache.of(cache).kept_fraction == pytest.approx(0.4, abs=0.01)
    with torch.no_grad(), pytest.raises(InvalidArgumentError, match="expected input_ids"), own(model):
        model(inputs_embeds=embeds, past_key_values=DynamicCache())


def test_presses_that_count_every_layer_refuse_sliding_ones(make_press: Any, context: Any) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    ragged = RaggedPress(make_press("FastKVzipPress"))
    done = read(Qwen2ForCausalLM(config).eval(), context(60))
    with pytest.raises(UnsupportedModelError, match="expected a model without sliding layers"):
        ragged.score(done)


def test_a_press_of_the_users_own_is_run_like_any_other(
    kvpress: Any, tiny_model: Any, context: Any, keep_of: Any
) -> None:
    class EverySecond(kvpress.BasePress):  # type: ignore[misc,name-defined]
        def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, *rest: Any) -> Any:
            return keys[:, :, ::2], values[:, :, ::2]

    class Scaling(EverySecond):
        def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, *rest: Any) -> Any:
            keys *= 0.5  # in place: on a copy
            return keys[:, :, ::2], values[:, :, ::2]

    honest, scaling = RaggedPress(EverySecond()), RaggedPress(Scaling())
    done = read(tiny_model(), context(60), scaling, honest)
    for mask in keep_of(done.evict(honest.score(done))):
        assert mask.nonzero()[:, 1].tolist() == [*range(0, 60, 2)] * 2
    with pytest.raises(InvalidArgumentError, match="Scaling changes keys or values"):
        scaling.score(done)


@pytest.mark.parametrize("error", [RuntimeError("selected index k out of range"), TypeError("no layer_type")])
def test_whatever_a_press_raises_comes_after_the_forward(
    error: Exception, kvpress: Any, tiny_model: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(kvpress.KnormPress, "score", fail)
    model, cache = tiny_model(), DynamicCache()
    expected = InvalidArgumentError if isinstance(error, TypeError) else RuntimeError
    with torch.no_grad(), RaggedPress(kvpress.KnormPress(0.5))(model), pytest.raises(expected, match=str(error)):
        model(context(20), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [20, 20, 20]


def test_each_row_has_a_press_of_its_own(kvpress: Any, tiny_model: Any, context: Any) -> None:
    class Remembering(kvpress.BasePress):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.seen = 0

        def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, *rest: Any) -> Any:
            self.seen += 1
            return keys[:, :, self.seen :], values[:, :, self.seen :]

    ragged = RaggedPress(Remembering())
    done = read(tiny_model(), context(60, batch=2), ragged)
    cache = done.evict(ragged.score(done))
    assert [cache.seqlens(layer_idx).tolist() for layer_idx in range(3)] == [[[60 - i] * 2] * 2 for i in (1, 2, 3)]
