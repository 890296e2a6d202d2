"""Contexts read in chunks: exact budgets, bounded memory, and nothing else where nothing is evicted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip_press import ComposedPress, KVzipPress, RaggedCache, RandomPress, answer, compress, compress_in_chunks
from kvzip_press.budget.amount import Ratio
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.press import AllocatingPress
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER, MODEL = ByteTokenizer(), tiny_model(num_layers=2)
laws = settings(deadline=None, max_examples=40, derandomize=True)


@dataclass(frozen=True)
class NormPress(AllocatingPress):
    """Keys of small norm first, sink and window protected, the window inside the budget: it looks at its span alone."""

    n_window: int = 3

    def score(self, prefill) -> Scores:
        layers = prefill.blank_scores()
        n = prefill.valid.shape[1]
        for layer_idx in layers:
            layer = prefill.cache.layers[layer_idx]
            keys = layer.tail.keys if isinstance(layer, RaggedLayer) else layer.keys
            layers[layer_idx] = -keys[:, :, -n:].float().norm(dim=-1)
        sink = prefill.protected(2)
        window = torch.arange(n)[None] >= n - self.n_window
        return Scores(layers, sink | window, self.policy, protected_count=window & ~sink)


def context(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def kept(cache) -> int:
    return sum(int(layer.packed.seqlens.sum()) for _, layer in cache.ragged_layers())


def prefix_length() -> int:
    from kvzip_press.model.chat import chat_frame

    return len(chat_frame(TOKENIZER).prefix)


@laws
@given(
    n=st.integers(1, 64),
    chunk_size=st.integers(1, 70),
    window_size=st.integers(0, 20),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 0.77, 0.95]),
    allocation=st.sampled_from(["global", "layer", "head", "adakv"]),
    rerank=st.booleans(),
)
def test_the_budget_is_exact_at_every_length_and_chunk_size(n, chunk_size, window_size, ratio, allocation, rerank):
    """As many pairs as in one go, and after every chunk too, of what has left the window."""
    press = NormPress(ratio, allocation, n_window=0)
    options = {"chunk_size": chunk_size, "window_size": window_size, "rerank": rerank}
    cache = compress_in_chunks(MODEL, TOKENIZER, context(n), press, **options)
    assert cache.get_seq_length() == prefix_length() + n
    assert kept(cache) == kept(compress(MODEL, TOKENIZER, context(n), press))


@pytest.mark.parametrize("rerank", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3"])
def test_where_nothing_is_evicted_chunks_change_nothing(architecture, rerank) -> None:
    model = tiny_model(architecture)
    whole = compress(model, TOKENIZER, context(150), NormPress(0.0))
    chunked = compress_in_chunks(
        model, TOKENIZER, context(150), NormPress(0.0), chunk_size=40, window_size=10, rerank=rerank
    )
    question = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": whole.get_seq_length() + torch.arange(3)[None]}
    with torch.no_grad():
        logits = [model(**question, past_key_values=cache, use_cache=True).logits for cache in (whole, chunked)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rerank", [True, False])
def test_memory_holds_the_kept_part_the_window_and_one_chunk(rerank, monkeypatch) -> None:
    """Measured on the storages after every forward, when a chunk is in the cache and nothing of it evicted yet."""
    from kvzip_press.prefilling import chunked as chunked_prefill

    n, chunk_size, window_size, ratio = 4000, 512, 256, 0.7
    model, held = MODEL, []
    read = chunked_prefill.run_prefill

    def measured(*args, **options):
        done = read(*args, **options)
        held.append(RaggedCache(done.cache.layers).resident_bytes)
        return done

    monkeypatch.setattr(chunked_prefill, "run_prefill", measured)
    options = {"chunk_size": chunk_size, "window_size": window_size, "rerank": rerank}
    cache = compress_in_chunks(model, TOKENIZER, context(n), NormPress(ratio), **options)
    a_pair = 2 * 16 * 4 + 4  # and its position
    pairs_a_token = 2 * 2
    bound = ((1 - ratio) * n + window_size + chunk_size + prefix_length()) * pairs_a_token * a_pair + 2 * 5 * 4
    assert len(held) == -(-(n + prefix_length()) // chunk_size)
    assert max(held) <= bound < 0.6 * cache.dense_bytes
    assert cache.kept_fraction == pytest.approx(1 - ratio, abs=0.002)


def test_a_dense_chunk_gets_more_where_all_compete() -> None:
    """Keys whose norm falls along the context: the last chunks' pairs are the best ones everywhere."""

    class FallingPress(NormPress):
        def score(self, prefill):
            scores = super().score(prefill)
            for values in scores.layers.values():
                values.copy_(prefill.positions[:, None].expand_as(values))
            return scores

    def early_pairs(rerank):
        options = {"chunk_size": 100, "window_size": 20, "rerank": rerank}
        cache = compress_in_chunks(MODEL, TOKENIZER, context(600), FallingPress(0.7), **options)
        return sum(int((layer.packed.positions < 200).sum()) for _, layer in cache.ragged_layers())

    protected = 2 * 2 * prefix_length()
    assert early_pairs(rerank=True) == protected
    assert early_pairs(rerank=False) > 0.25 * 200 * 4


@pytest.mark.parametrize("press", [KVzipPress(0.6, chunk_size=50), RandomPress(0.6)])
def test_presses_of_ours_read_in_chunks_and_answer(press) -> None:
    model = tiny_model()
    cache = compress_in_chunks(model, TOKENIZER, context(300), press, chunk_size=90, window_size=30)
    assert kept(cache) == kept(compress(model, TOKENIZER, context(300), press))
    before = cache.resident_bytes
    assert answer(model, TOKENIZER, cache, "?", max_new_tokens=5) == answer(
        model, TOKENIZER, cache, "?", max_new_tokens=5
    )
    assert cache.resident_bytes == before


def kept_of_whole(cache, ratio: float) -> dict[int, torch.Tensor]:
    """What the scores that pairs got with their chunks would keep of all of them at a ratio, by layer."""
    parts = {i: layer.cold[0] for i, layer in cache.ragged_layers()}
    span = next(iter(parts.values())).span
    scores = Scores(
        {i: part.scores() for i, part in parts.items()},
        span.protected,
        Policy(Ratio(ratio), span.policy.allocation),
        protected_count=span.protected_count,
    )
    return select(scores, span.valid)


@pytest.mark.parametrize(("architecture", "storage"), [("llama", "int8"), ("gemma3_text", "model")])
def test_what_chunks_lost_comes_back_as_it_was_read(architecture, storage, tmp_path, keep_masks) -> None:
    """All of it, or what the whole keeps at a ratio by the scores that its pairs got; from memory and from a file."""
    model, n = tiny_model(architecture), 90
    options = {"chunk_size": 40, "window_size": 10, "storage": storage}
    without = compress_in_chunks(model, TOKENIZER, context(n), NormPress(0.7), **options)
    cache = compress_in_chunks(model, TOKENIZER, context(n), NormPress(0.7), **options, cold="cpu")
    filed = compress_in_chunks(model, TOKENIZER, context(n), NormPress(0.7), **options, cold=tmp_path / "evicted")
    for layer, (_, other) in zip(dict(cache.ragged_layers()).values(), without.ragged_layers(), strict=True):
        assert all(map(torch.equal, layer.packed.tensors, other.packed.tensors))
    seen, before = torch.ones(1, cache.get_seq_length(), dtype=torch.bool), cache.fork()
    cache.save(tmp_path / "cache")
    for one in (cache, filed, RaggedCache.load(tmp_path / "cache", model)):
        one.restore()
        assert kept(one) == sum(layer.packed.num_heads * seen.shape[1] for _, layer in one.ragged_layers())
        for layer_idx, layer in before.ragged_layers():
            again, keep = one._ragged(layer_idx).packed, keep_masks(before, seen)[layer_idx][0]
            for name, column in layer.packed.columns.items():
                assert torch.equal(again.columns[name].unflatten(0, keep.shape)[keep], column), name
        for ratio in (0.3, 0.7):
            one.shrink(ratio)
            expected = kept_of_whole(one, ratio)
            assert all(torch.equal(mask, expected[i]) for i, mask in keep_masks(one, seen).items())


class EarlyPress(NormPress):
    """The earlier, the better: chunks lose pairs that are better than what stays of later ones."""

    def score(self, prefill) -> Scores:
        scores = super().score(prefill)
        for values in scores.layers.values():
            values.copy_(-prefill.positions[:, None].expand_as(values))
        return scores


def test_a_smaller_ratio_takes_away_what_is_worse_than_what_chunks_lost(keep_masks) -> None:
    cache = compress_in_chunks(
        MODEL, TOKENIZER, context(150), EarlyPress(0.7), chunk_size=40, window_size=10, cold="cpu"
    )
    seen = torch.ones(1, cache.get_seq_length(), dtype=torch.bool)
    before = keep_masks(cache, seen)
    cache.restore(0.65)
    after = keep_masks(cache, seen)
    assert any(bool((before[i] & ~after[i]).any()) for i in before)
    assert all(torch.equal(mask, kept_of_whole(cache, 0.65)[i]) for i, mask in after.items())
    with pytest.raises(InvalidArgumentError, match="restore does"):
        cache.shrink(0.6)


def test_what_chunks_lost_is_kept_only_where_it_can_come_back() -> None:
    options = {"chunk_size": 40, "cold": "cpu"}
    for more, match in (
        ({"rerank": False}, "expected cold=None with rerank=False"),
        ({"storage": "int4"}, "expected cold=None in chunks with the storage 'int4'"),
        ({"cold": "cuda"}, "expected cold='cpu'"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            compress_in_chunks(MODEL, TOKENIZER, context(150), NormPress(0.5), **{**options, **more})
    with pytest.raises(InvalidArgumentError, match="shrink does"):
        compress_in_chunks(MODEL, TOKENIZER, context(150), NormPress(0.5), **options).restore(0.8)


def test_a_budget_in_tokens_bounds_the_whole() -> None:
    cache = compress_in_chunks(MODEL, TOKENIZER, context(300), NormPress(budget=64), chunk_size=70, window_size=16)
    assert kept(cache) == 2 * 2 * (64 + prefix_length())


@pytest.mark.parametrize(
    ("options", "press", "match"),
    [
        ({"chunk_size": 0}, NormPress(0.5), "chunk_size >= 1"),
        ({"window_size": -1}, NormPress(0.5), "window_size >= 0"),
        ({"chunk_size": 50}, ComposedPress([NormPress(0.5), NormPress(0.5)]), "decides its own counts"),
    ],
)
def test_what_cannot_be_read_in_chunks_is_refused(options, press, match) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        compress_in_chunks(MODEL, TOKENIZER, context(120), press, **options)


def test_several_contexts_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="one context"):
        compress_in_chunks(MODEL, TOKENIZER, [context(120), context(120)], NormPress(0.5), chunk_size=50)
