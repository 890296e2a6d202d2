"""`with press(model):` compresses every prefill, exactly once, and leaves the model as it was."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvzip_press import KVzipPress, RaggedCache, RandomPress, Scores, compress, compress_in_chunks
from kvzip_press.attention.implementation import is_attached
from kvzip_press.errors import InvalidArgumentError, KVzipPressError, UnsupportedCacheError, UnsupportedModelError
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.press import AllocatingPress
from kvzip_press.testing import ByteTokenizer, tiny_model

N = 50


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def kvzip(ratio: float = 0.6) -> KVzipPress:
    return KVzipPress(ratio, tokenizer=ByteTokenizer(), chunk_size=16)


PRESSES = [RandomPress(0.6), kvzip()]


def state_of(model) -> dict:
    """Everything that a press could leave on a model."""
    return {
        name: (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    } | {"implementation": model.config._attn_implementation}


@pytest.mark.parametrize("press", PRESSES)
def test_forward_is_compressed_when_it_ends(press) -> None:
    """The logits of the prefill are the dense ones, the cache behind them is compressed."""
    model, ids = tiny_model(), token_ids(1, N)
    with torch.no_grad():
        expected = model(ids).logits
        with press(model):
            output = model(ids)
    assert torch.equal(output.logits, expected)
    cache = RaggedCache.of(output.past_key_values)
    free = 3 * 2 * (N - 4)
    assert int(sum(layer.packed.seqlens.sum() for _, layer in cache.ragged_layers())) == 24 + round(0.4 * free)


@pytest.mark.parametrize("press", PRESSES)
def test_generate_is_compressed_after_its_prefill(press) -> None:
    """Inside generate the prefill is compressed and no decode step is."""
    model = tiny_model()
    model.generation_config.eos_token_id = None
    with press(model):
        out = model.generate(token_ids(1, N), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = RaggedCache.of(out.past_key_values)
    assert cache.get_seq_length() == N + 7
    assert all(layer.n_context == N and layer.tail.length == 7 for _, layer in cache.ragged_layers())


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("reenter", [True, False])
def test_a_later_turn_is_compressed_too(press, reenter) -> None:
    """A second turn's tokens are compressed; what was kept of the first stays, and what was generated between stays."""
    model, cache = tiny_model(), DynamicCache()
    with torch.no_grad():
        with press(model):
            model(token_ids(1, N), past_key_values=cache)
            if not reenter:
                model(token_ids(1, 30, seed=1), past_key_values=cache)
        first = [p.tolist() for p in RaggedCache.of(cache).kept_positions(0)[0]]
        if reenter:
            for step in range(3):
                model(token_ids(1, 1, seed=step), past_key_values=cache)
            with press(model):
                model(token_ids(1, 30, seed=1), past_key_values=cache)
    view = RaggedCache.of(cache)
    between = 3 if reenter else 0
    assert view.get_seq_length() == N + between + 30
    kept = int(sum(layer.packed.seqlens.sum() for _, layer in view.ragged_layers()))
    assert kept == 24 + round(0.4 * 6 * (N - 4)) + 6 * between + round(0.4 * 6 * 30)
    after = [p.tolist() for p in view.kept_positions(0)[0]]
    if reenter:
        assert all(late[: len(early)] == early for early, late in zip(first, after, strict=True))
        assert all(set(range(N, N + 3)) <= set(positions) for positions in after)
    assert all(layer.tail.length == 0 for _, layer in view.ragged_layers())


@pytest.mark.parametrize("press", PRESSES)
def test_the_model_is_left_as_it_was(press) -> None:
    """After the context no hook and no attribute is left; only the attention's name stays, so the cache can be used."""
    model = tiny_model()
    before = state_of(model)
    with torch.no_grad(), press(model):
        model(token_ids(1, N))
    assert is_attached(model)
    assert {**state_of(model), "implementation": "sdpa"} == before


@pytest.mark.parametrize("press", PRESSES)
def test_an_exception_leaves_no_trace(press) -> None:
    """An error inside the context undoes everything, the attention's name included."""
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="user's error"), press(model):
        raise RuntimeError("user's error")
    assert state_of(model) == before
    with pytest.raises(IndexError), press(model), torch.no_grad():
        model(torch.tensor([[5, 10_000]]))
    assert state_of(model) == before


def test_a_scorer_that_fails_leaves_the_users_cache_dense() -> None:
    """When scoring raises, the cache is what the forward made of it."""

    class Broken(RandomPress):
        def score(self, prefill):
            raise ArithmeticError("no scores")

    model, cache = tiny_model(), DynamicCache()
    with pytest.raises(ArithmeticError), torch.no_grad(), Broken(0.5)(model):
        model(token_ids(1, N), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == N and not is_attached(model)


def test_every_sample_in_a_context_is_compressed() -> None:
    """A press that stays open compresses each new cache to its budget, not only the first."""
    model, press = tiny_model(), kvzip()
    with torch.no_grad(), press(model):
        for length in (N, 31, 44):
            cache = RaggedCache.of(model(token_ids(1, length)).past_key_values)
            kept = int(sum(layer.packed.seqlens.sum() for _, layer in cache.ragged_layers()))
            assert kept == 24 + round(0.4 * 6 * (length - 4))


def test_interleaved_caches_give_what_each_gives_alone() -> None:
    """Two contexts on one model, steps interleaved with an untouched dense cache, bit for bit."""
    model = tiny_model()
    contexts = [token_ids(1, N, seed=s) for s in (1, 2)]
    steps = [token_ids(1, 1, seed=s) for s in range(5)]

    def begin(ids, press):
        cache = DynamicCache()
        with torch.no_grad():
            if press is None:
                model(ids, past_key_values=cache)
            else:
                with press(model):
                    model(ids, past_key_values=cache)
        return cache

    def run(*caches):
        with torch.no_grad():
            return [[model(step, past_key_values=cache).logits for cache in caches] for step in steps]

    presses = [kvzip(), RandomPress(0.3)]
    alone = [run(begin(ids, press)) for ids, press in zip(contexts, presses, strict=True)]
    dense = run(begin(contexts[0], None))
    caches = [begin(ids, press) for ids, press in zip(contexts, presses, strict=True)] + [begin(contexts[0], None)]
    together = run(*caches)
    for step, triple in enumerate(together):
        for got, expected in zip(triple, [*alone, dense], strict=True):
            assert torch.equal(got, expected[step][0])


def test_order_of_presses_does_not_matter() -> None:
    """A press's kept set is the same whichever press ran before it."""
    model, ids = tiny_model(), token_ids(1, N)
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool))
    first = kvzip().score(done)
    done.evict(RandomPress(0.5).score(done))
    again = kvzip().score(done)
    assert all(torch.equal(first.layers[i], again.layers[i]) for i in first.layers)


def test_one_prefill_and_one_scoring_serve_every_ratio() -> None:
    """Any number of caches come from one scoring, and the prefill stays dense and untouched."""
    model, ids = tiny_model(), token_ids(1, N)
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool))
    before = [layer.keys.clone() for layer in done.cache.layers]
    scores = kvzip().score(done)
    fractions = [done.evict(scores, ratio).kept_fraction for ratio in (0.0, 0.3, 0.6, 0.9)]
    assert fractions == sorted(fractions, reverse=True) and fractions[0] == 1.0
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(done.cache.layers, before, strict=True))
    layerwise = done.evict(scores, 0.5, allocation="layer")
    assert len({int(layer.packed.seqlens.sum()) for _, layer in layerwise.ragged_layers()}) == 1


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 64])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("make", [RandomPress, kvzip])
def test_short_contexts(make, ratio, length) -> None:
    """Contexts of 1..64 tokens work at every ratio; each layer keeps a pair and the next token can be computed."""
    model = tiny_model()
    with torch.no_grad(), make(ratio)(model):
        cache = model(token_ids(1, length)).past_key_values
    view = RaggedCache.of(cache)
    assert all(int(layer.packed.seqlens.sum()) >= 1 for _, layer in view.ragged_layers())
    assert (view.kept_fraction == 1.0) == (ratio == 0.0 or length <= 4)
    with torch.no_grad():
        assert model(token_ids(1, 1), past_key_values=cache).logits.isfinite().all()


def test_caches_that_cannot_be_compressed_are_refused() -> None:
    """Static and offloaded caches raise before anything is computed, and say what was expected."""
    model = tiny_model()
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(UnsupportedCacheError, match="DynamicCache"), RandomPress(0.5)(model):
        model(token_ids(1, 8), past_key_values=static)
    with pytest.raises(UnsupportedCacheError, match="use_cache=True"), RandomPress(0.5)(model):
        model(token_ids(1, 8), use_cache=False)


def test_a_span_is_evicted_in_place_once() -> None:
    """Evicting what is gone already raises, and says how to make several caches of one prefill."""
    model, ids = tiny_model(), token_ids(1, N)
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool))
    scores = RandomPress(0.5).score(done)
    done.evict_in_place(scores)
    for again in (done.evict, done.evict_in_place):
        with pytest.raises(UnsupportedCacheError, match="already evicted"):
            again(scores)


def test_scores_of_another_prefill_are_refused() -> None:
    """Scores over another span raise before anything is evicted."""
    model, ids = tiny_model(), token_ids(1, N)
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool))
    other = run_prefill(model, ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match="another prefill"):
        done.evict(RandomPress(0.5).score(other))


def test_masks_that_cannot_be_understood_are_refused() -> None:
    """A mask with holes, a 4-D mask and a row of padding only raise, before anything is computed."""
    model, ids = tiny_model(), token_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    holes, empty = mask.clone(), mask.clone()
    holes[0, 3] = 0
    empty[1] = 0
    for wrong, message in ((holes, "holes"), (empty, "padding only"), (mask[:, None, None].bool(), "2-D")):
        cache = DynamicCache()
        with pytest.raises(InvalidArgumentError, match=message), RandomPress(0.5)(model):
            model(ids, attention_mask=wrong, past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_models_without_full_attention_are_refused() -> None:
    """A model of sliding layers only, and one that is no decoder, raise and name their class."""
    sliding = tiny_model("mistral", sliding_window=16)
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM"), RandomPress(0.5)(sliding):
        pass
    with pytest.raises(UnsupportedModelError, match="Linear"), RandomPress(0.5)(torch.nn.Linear(2, 2)):
        pass


def test_one_press_at_a_time() -> None:
    """A second press on the same model is refused instead of compressing twice."""
    model = tiny_model()
    with RandomPress(0.5)(model), pytest.raises(KVzipPressError, match="one press"), RandomPress(0.5)(model):
        pass


def test_compressed_caches_are_freed() -> None:
    """Nothing in the library keeps a cache alive."""
    model = tiny_model()
    with torch.no_grad(), RandomPress(0.5)(model):
        cache = model(token_ids(1, N)).past_key_values
    layer = cache.layers[0]
    pointer = id(layer)
    del cache, layer
    gc.collect()
    assert not any(id(o) == pointer and type(o).__name__ == "RaggedLayer" for o in gc.get_objects())


@dataclass(frozen=True)
class LoudPress(AllocatingPress):
    """The press of the notebook, as a user would write it."""

    n_sink: int = 4

    def score(self, prefill):
        scores = {}
        for layer_idx in prefill.blank_scores():
            keys, values = prefill.pairs(layer_idx)
            scores[layer_idx] = values.float().norm(dim=-1) / keys.float().norm(dim=-1)
        return Scores(scores, prefill.protected(self.n_sink), self.policy)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_press_of_a_user_s_own_works_in_chunks_and_in_a_second_turn(architecture) -> None:
    """`Prefill.pairs` gives those of the span wherever they lie."""
    model, tokenizer = tiny_model(architecture), ByteTokenizer()
    ids, press = token_ids(1, 90)[0].tolist(), LoudPress(0.5)
    whole = compress(model, tokenizer, ids, press)
    chunked = compress_in_chunks(model, tokenizer, ids, press, chunk_size=40, window_size=0)
    n_pairs = {name: sum(int(x.packed.seqlens.sum()) for _, x in c.ragged_layers())
               for name, c in {"whole": whole, "chunked": chunked}.items()}  # fmt: skip
    assert n_pairs["whole"] == n_pairs["chunked"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), press(model):
        model(token_ids(1, 40), past_key_values=cache)
        model(token_ids(1, 30, seed=1), past_key_values=cache)
    layers = dict(RaggedCache.of(cache).ragged_layers())
    assert sum(int(x.packed.seqlens.sum()) for x in layers.values()) == len(layers) * 2 * (4 + (36 + 30) // 2)


def test_the_pairs_of_a_span_are_those_that_the_model_left() -> None:
    """Dense, behind a context, and refused once they were evicted."""
    model, ids = tiny_model(), token_ids(2, 50)
    first = run_prefill(model, ids[:, :30], torch.ones(2, 30, dtype=torch.bool))
    for layer_idx in first.blank_scores():
        layer = first.cache.layers[layer_idx]
        assert all(torch.equal(*pair) for pair in zip(first.pairs(layer_idx), (layer.keys, layer.values), strict=True))
    first.evict_in_place(RandomPress(0.5).score(first))
    later = run_prefill(model, ids[:, 30:], torch.ones(2, 20, dtype=torch.bool), cache=first.cache)
    for layer_idx in later.blank_scores():
        tail = later.cache.layers[layer_idx].tail
        assert all(torch.equal(*pair) for pair in zip(later.pairs(layer_idx), (tail.keys, tail.values), strict=True))
        assert later.pairs(layer_idx)[0].shape == (2, 2, 20, 16)
    later.evict_in_place(RandomPress(0.5).score(later))
    with pytest.raises(UnsupportedCacheError, match="evicted already"):
        later.pairs(0)


@pytest.mark.parametrize("layer_idx", [0, 4, -1, "1"])
def test_pairs_of_a_layer_that_is_not_compressed_are_refused(layer_idx) -> None:
    """A sliding layer has lost some of them, and is none of a press's business."""
    done = run_prefill(tiny_model("gemma3_text"), token_ids(1, 20), torch.ones(1, 20, dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match=r"one of the layers \[1, 3\]"):
        done.pairs(layer_idx)
