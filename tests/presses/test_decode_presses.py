"""Presses that evict while the model writes keep what their papers' formulas keep."""

from __future__ import annotations

from typing import Any

import decode_oracles as oracles
import pytest
import torch
from transformers import DynamicCache

from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.presses.decoding import (
    H2OPress,
    KnormDecodePress,
    RKVPress,
    SnapKVDecodePress,
    StreamingLLMDecodePress,
    TOVADecodePress,
)
from kvzip_press.testing import tiny_model

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
    (H2OPress, {}, oracles.h2o, {"recent": 12}),
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
