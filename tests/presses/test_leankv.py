"""LeanKV's borders between many bits, few and none: by the formula, behind any weights of attention, refused else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import KVzipPress, RaggedCache, RandomPress, compress, compress_in_chunks, get_press
from kvzip_press.budget.allocators import AboveUniform
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.pair_pool.pool import PairPool
from kvzip_press.errors import InvalidArgumentError, UnsupportedCacheError
from kvzip_press.prefilling.whole import Prefill, run_prefill
from kvzip_press.press import Press
from kvzip_press.presses.composed import ComposedPress
from kvzip_press.presses.decoding.tova import TOVADecodePress
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

N, WINDOW, FIRST = 60, 8, 4
TOKENIZER, TEXT = ByteTokenizer(), "The night ferry leaves at 21:40, and the quota is 310 tonnes. " * 3


def read(press: Press, valid: torch.Tensor | None = None, n: int = N) -> tuple[Any, Prefill, Scores]:
    model = tiny_model(num_layers=2)
    ids = torch.randint(3, 128, (1 if valid is None else len(valid), n), generator=torch.Generator().manual_seed(0))
    done = run_prefill(
        model, ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid, observers=[press]
    )
    return model, done, press.score(done)


def significance(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer ``[heads, n]``: the mean over the last queries, the most of a group, in fp64."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model.double()(ids, output_attentions=True).attentions
    return [layer[0, :, -WINDOW:].mean(1).view(2, 2, -1).amax(1) for layer in attentions]


def test_pairs_are_high_low_or_dropped_by_the_papers_formula() -> None:
    """The window is high, the first tokens are exact, and heads differ in all counts."""
    low, high = 0.8, 1.3
    model, done, scores = read(get_press("leankv", low=low, high=high, window_size=WINDOW))
    cache = done.evict(scores)
    assert cache.storage == "tiers:1.3/n"
    counts = set()
    for (_, layer), expected in zip(cache.ragged_layers(), significance(model, done.input_ids), strict=True):
        relative = expected * N
        relative[:, -WINDOW:] = torch.inf
        kept = [set(row.tolist()) for row in layer.packed.positions.split(layer.packed.seqlens[0].tolist())]
        assert kept == [set((head >= low).nonzero()[:, 0].tolist()) for head in relative]
        is_high = layer.packed.columns["is_high"].bool().split(layer.packed.seqlens[0].tolist())
        positions = layer.packed.positions.split(layer.packed.seqlens[0].tolist())
        for flags, where, head in zip(is_high, positions, relative, strict=True):
            assert torch.equal(flags, head[where.long()] >= high)
            counts.add((len(where), int(flags.sum())))
    assert len(counts) == 4 and all(high < n < N for n, high in counts)


@pytest.mark.parametrize("name", ["snapkv", "tova", "kvzip"])
def test_both_borders_work_with_all_weights_of_attention(name: str) -> None:
    """A smaller factor keeps a superset; each row by its own length."""
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[0, :25] = False
    options = {"window_size": WINDOW} if name == "snapkv" else {}
    kept = []
    for factor in (0.0, 0.9, 2.0):
        press = get_press(name, storage="tiers:1.5/n", allocation=AboveUniform(factor=factor), **options)
        _, done, scores = read(press, valid)
        plain = get_press(name, 0.5, **options).score(done)
        cache = done.evict(scores)
        kept.append(cache.kept_fraction)
        for i, layer in cache.ragged_layers():
            relative = plain.layers[i] * valid.sum(1)[:, None, None]
            expected = (relative >= factor) | plain.protected[:, None]
            assert torch.equal(layer.packed.seqlens.long(), (expected & valid[:, None]).sum(-1))
            rows = layer.packed.segments_of_entries()
            importance = relative.masked_fill(plain.protected[:, None], torch.inf).flatten(0, 1)
            columns = layer.packed.positions.long() + (~valid).sum(1)[rows // 2]
            assert torch.equal(layer.packed.columns["is_high"].bool(), importance[rows, columns] >= 1.5)
    assert kept[0] > kept[1] > kept[2]


def test_chunks_turns_and_evicted_pairs_that_come_back_follow_the_same_borders() -> None:
    """A chunk shares its attention among its own pairs."""
    press = get_press("tova", storage="tiers:1/n", allocation=AboveUniform(factor=0.6))
    model = tiny_model(num_layers=2)
    cache = compress_in_chunks(model, TOKENIZER, TEXT, press, chunk_size=48, window_size=8)
    assert 0.2 < cache.kept_fraction < 0.9
    dense, n_before = DynamicCache(), cache.n_seen
    dense.layers = list(cache.layers)
    with press(model), torch.no_grad():
        model(torch.arange(3, 33)[None], past_key_values=dense)
    for _, layer in RaggedCache.of(dense).ragged_layers():
        new = layer.packed.positions >= n_before
        assert 0 < int(new.sum()) < 60 and len(layer.packed.columns["is_high"][new].unique()) == 2
    _, done, scores = read(get_press("tova", 0.6, storage="tiers:1/n"))
    whole = done.evict(scores, 0.3)
    back = done.evict(scores, cold="cpu")
    back.restore(0.3)
    for (_, one), (_, other) in zip(back.ragged_layers(), whole.ragged_layers(), strict=True):
        assert torch.equal(one.packed.columns["is_high"], other.packed.columns["is_high"])


@pytest.mark.parametrize(
    "press",
    [
        RandomPress(0.5),
        KVzipPress(0.5, kvzip_plus=True),
        KVzipPress(0.5, weighting="surprisal"),
        get_press("knorm", 0.5),
        ComposedPress([get_press("tova", 0.5)]),
    ],
    ids=lambda press: type(press).__name__,
)
def test_scores_that_are_no_weights_of_attention_are_refused(press: Press) -> None:
    """By either border, wherever it is named; nothing is evicted."""
    _, done, scores = read(press)
    match = "expected scores that are weights of attention.*got those of .*Press.*take snapkv, tova or kvzip"
    with pytest.raises(InvalidArgumentError, match=match):
        done.evict(scores, storage="tiers:1/n")
    with pytest.raises(InvalidArgumentError, match=match):
        done.evict_in_place(scores, storage="tiers:1/n")
    assert not any(True for _ in RaggedCache(done.cache.layers).ragged_layers())
    if not scores.is_decided:
        with pytest.raises(InvalidArgumentError, match=match):
            done.evict(scores, 0.0, "above_uniform")


@pytest.mark.parametrize("prompt", [None, get_press("tova", 0.5)], ids=["own", "tova"])
def test_what_the_model_writes_has_no_uniform_attention(prompt: Press | None) -> None:
    """Neither a press for what is written nor one for its prompt can be stored by that border."""
    press = TOVADecodePress(budget=40, buffer=4, storage="tiers:1/n", prompt=prompt)
    model = tiny_model(num_layers=2)
    with press(model), pytest.raises((InvalidArgumentError, UnsupportedCacheError), match="uniform attention"):
        model.generate(torch.arange(3, 70)[None], max_new_tokens=20, do_sample=False, eos_token_id=None)


def test_a_pool_of_pairs_refuses_the_border_too() -> None:
    """However its pairs came to carry scores."""
    _, done, scores = read(get_press("tova", 0.5))
    cache = done.evict(replace(scores, carried=True), storage="tiers:1/n")
    with pytest.raises(UnsupportedCacheError, match=r"expected a storage without uniform attention.*got 'tiers:1/n'"):
        PairPool.of([layer for _, layer in cache.ragged_layers()])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: get_press("leankv", 0.5), "no ratio and no budget with allocation"),
        (lambda: get_press("leankv", low=-1), "expected factor .* 0 or more, got -1"),
        (lambda: get_press("leankv", low=True), "expected factor"),
        (lambda: get_press("leankv", high=-1), "expected tiers with a share"),
        (lambda: get_press("snapkv", 0.5, group="sum"), 'expected group to be "mean" or "max"'),
        (lambda: RandomPress(allocation={"name": "above_uniform", "factor": "1"}), "expected factor"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        make()


@pytest.mark.parametrize("wrong", [torch.ones(1, N, dtype=torch.float64), torch.zeros(1, N), torch.ones(N), 0.1])
def test_uniform_attention_is_a_number_above_0_for_each_pair(wrong: Any) -> None:
    scores = read(get_press("tova", 0.5))[2]
    with pytest.raises(InvalidArgumentError, match="expected uniform as None or a float32 tensor"):
        Scores(scores.layers, scores.protected, scores.policy, uniform=wrong)


def test_a_compressed_context_answers() -> None:
    cache = compress(tiny_model(num_layers=2), TOKENIZER, TEXT, "leankv")
    assert cache.storage == "tiers:1/n" and cache.compression > 1
