"""Presses that evict while the model writes keep what their papers' formulas keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import decode_oracles as oracles
import pytest
import torch
from transformers import DynamicCache

from kvzip_press import compress_in_chunks, get_press
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding import (
    H2OPress,
    KnormDecodePress,
    KVCompressPress,
    RKVPress,
    SnapKVDecodePress,
    StreamingLLMDecodePress,
    TOVADecodePress,
)
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def distinct_ids(length: int) -> torch.Tensor:
    """No token twice: equal tokens would tie."""
    return 3 + torch.randperm(250, generator=torch.Generator().manual_seed(0))[None, :length]


@torch.no_grad()
def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


def held_by(cache: Any, layer_idx: int = 0, row: int = 0) -> list[list[int]]:
    layer = cache.layers[layer_idx]
    assert isinstance(layer, RaggedLayer)
    end, n = int(layer.next_positions[row]), int(layer.n_tail_tokens[row])
    return [layer.packed.head_positions(row, head).tolist() + list(range(end - n, end)) for head in range(2)]


CASES = [
    (StreamingLLMDecodePress, {}, oracles.streaming_llm, {"n_sink": 4}),
    (KnormDecodePress, {"skip_layers": ()}, oracles.knorm, {}),
    (TOVADecodePress, {"n_recent": 1}, oracles.tova, {"recent": 1}),
    (TOVADecodePress, {"n_sink": 2}, oracles.tova, {"n_sink": 2}),
    (SnapKVDecodePress, {"window_size": 6}, oracles.snapkv(6, 5), {"recent": 6}),
    (H2OPress, {}, oracles.h2o, {"recent": 12, "adds_up": True}),
    (
        KVCompressPress,
        {"window_size": 10, "allocation": "head", "kernel_size": 1},
        oracles.kv_compress(1),
        {"recent": 10, "adds_up": True},
    ),
    (RKVPress, {}, oracles.rkv(0.07, 8, 7, 0.5), {"recent": 8}),
    (RKVPress, {"lam": 0.7, "threshold": 0.1}, oracles.rkv(0.7, 8, 7, 0.1), {"recent": 8}),
]


@pytest.mark.parametrize("buffer", [1, 10])
@pytest.mark.parametrize(("kind", "options", "worth", "stays"), CASES)
def test_what_is_kept_is_what_the_formula_keeps(kind, options, worth, stays, buffer) -> None:
    """Behind the prompt and behind each token; with ``buffer=1`` that is the papers' step by step."""
    model, ids = tiny_model(num_layers=1, vocab_size=256), distinct_ids(90)
    oracle = oracles.Oracle(oracles.Text.read_by(model, ids), worth, budget=24, buffer=buffer, **stays)
    expected = oracle.keep(prompt=40, length=90 if buffer > 1 else 60)
    cache = DynamicCache(config=model.config)
    with kind(budget=24, buffer=buffer, **options)(model):
        step(model, cache, ids[:, :40])
        assert held_by(cache) == expected[0]
        for token, kept in enumerate(expected[1:], start=40):
            step(model, cache, ids[:, token : token + 1])
            assert held_by(cache) == kept, token


@pytest.mark.parametrize(("kind", "options", "worth", "stays"), CASES)
def test_a_prompt_that_fits_the_budget_is_evicted_later(kind, options, worth, stays) -> None:
    """Also one that is shorter than the tokens that stay as the newest: it is not taken for a sink."""
    model, ids = tiny_model(num_layers=1, vocab_size=256), distinct_ids(60)
    expected = oracles.Oracle(oracles.Text.read_by(model, ids), worth, budget=24, buffer=8, **stays).keep(5, 60)
    cache = DynamicCache(config=model.config)
    with kind(budget=24, buffer=8, **options)(model):
        for token in range(4, 60):
            step(model, cache, ids[:, :5] if token == 4 else ids[:, token : token + 1])
    assert held_by(cache) == expected[-1]


def test_layers_that_knorm_skips_keep_their_newest_pairs() -> None:
    """Layers 0 and 1 by default, and no more than any other."""
    model, ids = tiny_model(vocab_size=256), distinct_ids(60)
    cache = DynamicCache(config=model.config)
    with KnormDecodePress(budget=16, buffer=4)(model):
        step(model, cache, ids[:, :40])
        for token in range(40, 44):
            step(model, cache, ids[:, token : token + 1])
    newest = list(range(28, 44))
    assert [held_by(cache, layer_idx) == [newest, newest] for layer_idx in range(3)] == [True, True, False]


def test_kv_compress_pools_over_neighbours_in_a_prompt() -> None:
    """There alone: while the model writes, pooled pairs would tie for ever."""
    model, ids = tiny_model(num_layers=1, vocab_size=256), distinct_ids(60)
    text = oracles.Text.read_by(model, ids)
    oracle = oracles.Oracle(text, oracles.kv_compress(7), budget=24, buffer=8, recent=10, adds_up=True)
    cache = DynamicCache(config=model.config)
    with KVCompressPress(budget=24, buffer=8, window_size=10, allocation="head")(model):
        step(model, cache, ids)
    assert held_by(cache) == oracle.keep(60, 60)[0]


def repeated_paragraph(copies: int, length: int, window: int) -> LayerPairs:
    """Keys of a paragraph of unlike tokens, several times with a little noise, then others; even queries."""
    generator = torch.Generator().manual_seed(0)
    unlike = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    paragraph, others = unlike[:length], unlike[length : length + window]
    keys = torch.cat([paragraph.repeat(copies, 1), others])
    keys = (keys + 0.01 * torch.randn(keys.shape, generator=generator))[None, None]
    n = keys.shape[2]
    return LayerPairs(
        0,
        keys,
        torch.ones(1, 1, n, dtype=torch.bool),
        torch.arange(n)[None, None],
        torch.zeros(1, 1, n),
        torch.tensor([n]),
        torch.zeros(1, 2, n, 64),
        torch.ones(1, n, dtype=torch.bool),
    )


def test_rkv_spares_the_last_copy_of_a_repeated_paragraph() -> None:
    """Where attention is even, R-KV's best pairs are the last copy, and H2O's the first."""
    pairs = repeated_paragraph(copies=4, length=20, window=8)
    last, first = set(range(60, 80)), set(range(20))
    best = RKVPress(budget=28).worth(pairs)[0, 0, :80].topk(20).indices.tolist()
    assert set(best) == last
    best = H2OPress(budget=28).worth(pairs)[0, 0, :80].topk(20).indices.tolist()
    assert set(best) == first


def test_rkv_has_no_quirk_about_its_first_pair() -> None:
    """A row without a near-duplicate sets no pair to 0: in the authors' code it sets the first."""
    pairs = repeated_paragraph(copies=1, length=20, window=8)
    keys = torch.nn.functional.normalize(pairs.keys[0, 0].double(), dim=-1)
    cosines = keys @ keys.T
    cosines.fill_diagonal_(0)
    assert float(cosines.max()) < 0.5
    expected = cosines.mean(dim=0).softmax(dim=-1)
    torch.testing.assert_close(RKVPress(budget=28).redundancy(pairs)[0, 0].double(), expected, atol=1e-7, rtol=0)


def noisy_copies(batch: int, heads: int, dtype: torch.dtype) -> LayerPairs:
    """Rows of noisy copies of a few keys, and a zero, of different lengths; columns without a pair are full of NaN."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(batch, heads, 10, 16, generator=generator).repeat(1, 1, 4, 1)
    keys = (keys + 0.3 * torch.randn(keys.shape, generator=generator)).to(dtype)
    keys[:, :, 20] = 0
    valid = torch.arange(40) >= torch.arange(batch * heads).view(batch, heads, 1)
    none = torch.zeros(0)
    return LayerPairs(0, keys.masked_fill(~valid[..., None], torch.nan), valid, none, none, none, none, none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rkv_s_redundancy_is_that_of_the_whole_matrix_of_cosines(dtype) -> None:
    """Row by row of a batch, by the docstring in fp64; what columns without a pair hold does not matter."""
    pairs = noisy_copies(3, 2, dtype)
    found = RKVPress(budget=28, threshold=0.6).redundancy(pairs)
    assert found.dtype == torch.float32
    for row, head in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        own = pairs.valid[row, head]
        keys = torch.nn.functional.normalize(pairs.keys[row, head, own].double(), dim=-1)
        cosines = (keys @ keys.T).fill_diagonal_(0)
        for line in cosines:
            line[(line > 0.6).nonzero()[-1:]] = 0
        expected = cosines.mean(dim=0).softmax(dim=-1)
        torch.testing.assert_close(found[row, head, own].double(), expected, atol=1e-7, rtol=0)
        assert not found[row, head, ~own].any()


def test_rkv_s_redundancy_in_parts_is_that_of_all_at_once(monkeypatch) -> None:
    """In tiles of cosines, and in rows of a batch."""
    pairs = noisy_copies(5, 2, torch.bfloat16)
    whole = RKVPress(budget=28).redundancy(pairs)
    monkeypatch.setattr("kvzip_press.kernels.near_duplicates.reference.TILE", 500)
    monkeypatch.setattr("kvzip_press.presses.decoding.rkv.NUMBERS_AT_ONCE", 2 * 2 * 40 * 16)
    torch.testing.assert_close(RKVPress(budget=28).redundancy(pairs), whole, atol=1e-7, rtol=0)


def test_attention_in_blocks_of_queries_is_that_of_one(monkeypatch) -> None:
    generator, pairs = torch.Generator().manual_seed(0), repeated_paragraph(copies=2, length=10, window=4)
    pairs = replace(pairs, queries=torch.randn(pairs.queries.shape, generator=generator))
    whole = H2OPress(budget=28).worth(pairs)
    monkeypatch.setattr("kvzip_press.decoding.layer_pairs.BLOCK_NUMBERS", 100)
    torch.testing.assert_close(H2OPress(budget=28).worth(pairs), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [
    {},
    {"budget": 64, "compression_ratio": 0.5},
    {"budget": 64, "allocation": "layer", "layer_ratios": [0.5] * 3},
    {"budget": 64, "buffer": 0},
    {"budget": 8},
    {"budget": 64, "n_sink": -1},
    {"budget": 64, "window_size": 0},
    {"budget": 64, "kernel_size": 4},
    {"budget": 64, "lam": 2.0},
    {"budget": 64, "prompt": "no_such_press"},
    {"budget": 64, "prompt": RKVPress(budget=32)},
])  # fmt: skip
def test_values_out_of_range_are_refused(options) -> None:
    with pytest.raises(InvalidArgumentError):
        RKVPress(**options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TOVADecodePress, {"n_recent": -1}),
        (KnormDecodePress, {"skip_layers": (-1,)}),
        (H2OPress, {"recent_fraction": 1.0}),
        (SnapKVDecodePress, {"kernel_size": 2}),
    ],
)
def test_values_out_of_range_of_other_presses_are_refused(kind, options) -> None:
    with pytest.raises(InvalidArgumentError, match=kind.__name__):
        kind(budget=64, **options)


def test_a_context_in_chunks_is_read_inside_the_press_instead() -> None:
    model = tiny_model(num_layers=1, vocab_size=256)
    with pytest.raises(InvalidArgumentError, match="one forward"):
        compress_in_chunks(model, ByteTokenizer(), list(range(3, 90)), RKVPress(budget=24), chunk_size=32)


def test_a_press_is_found_by_its_name() -> None:
    assert get_press("h2o", budget=64) == H2OPress(budget=64)
    with pytest.raises(InvalidArgumentError, match="budget=TOKENS"):
        get_press("rkv")
