"""A prefix that the user's cache held before a press: it stays whole, and what is read after it is compressed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, get_press
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.presses.fastkvzip import FastKVzipPress, Gates, LayerGate
from kvzip_press.presses.kvzip import KVzipPress
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ARCHITECTURES, tiny_model

N_PREFIX, N_SPAN = 21, 70
TOLERANCE = {"atol": 2e-5, "rtol": 2e-4}


def ids_of(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_gates(model: Any) -> Gates:
    torch.manual_seed(0)
    gates = [LayerGate(64, 2, 2) for _ in full_attention_layers(model)]
    for gate in gates:
        for parameter in gate.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape)
    return Gates([gate.requires_grad_(False) for gate in gates])


def press_of(name: str, model: Any, ratio: float) -> Any:
    if name == "decoding":
        return FastKVzipPress(decoding=True, budget=60 if ratio else 300, buffer=16, gate=random_gates(model))
    return FastKVzipPress(ratio, gate=random_gates(model)) if name == "fastkvzip" else get_press(name, ratio)


PRESSES = ["kvzip", "fastkvzip", "random", "decoding"]
PRESSES += [pytest.param(name, marks=pytest.mark.kvpress) for name in ("kvpress_keydiff", "kvpress_snapkv")]


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=True, **options).logits[:, -1]


def prefix_read(model: Any, ids: torch.Tensor, **options: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :N_PREFIX], cache, **options)
    return cache


def positions(cache: Any, row: int = 0) -> list[list[int]]:
    layers = [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]
    return [layer.packed.head_positions(row, head).tolist() for layer in layers for head in range(2)]


@pytest.mark.parametrize("name", PRESSES)
def test_nothing_removed_it_generates_what_the_model_does(name: str) -> None:
    model, ids = tiny_model(), ids_of(N_PREFIX + N_SPAN)
    plain, mine = prefix_read(model, ids), prefix_read(model, ids)
    expected = model.generate(ids, past_key_values=plain, max_new_tokens=12, do_sample=False)
    with press_of(name, model, 0.0)(model):
        generated = model.generate(ids, past_key_values=mine, max_new_tokens=12, do_sample=False)
    assert generated.tolist() == expected.tolist()
    assert all(isinstance(layer, RaggedLayer) for layer in mine.layers)


CASES = [(name, architecture) for name in PRESSES[:3] for architecture in ("llama", "gemma3_text")]
CASES += [("kvzip", architecture) for architecture in sorted({*ARCHITECTURES} - {"llama", "gemma3_text"})]
CASES += [pytest.param(*name.values, "llama", marks=name.marks) for name in PRESSES[4:]]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_the_prefix_stays_whole_and_the_rest_is_as_in_a_later_turn(name: str, architecture: str) -> None:
    model, ids = tiny_model(architecture, attn_implementation="eager"), ids_of(N_PREFIX + N_SPAN)
    press, cache, turns = press_of(name, model, 0.6), prefix_read(model, ids), DynamicCache(config=model.config)
    with press(model):
        got = read(model, ids[:, N_PREFIX:], cache)
    with RandomPress(0.0)(model):
        read(model, ids[:, :N_PREFIX], turns)
    for layer in turns.layers:
        if isinstance(layer, RaggedLayer):
            layer.n_protected = (N_PREFIX,)  # a prefix of the user's is a prefix
    with press(model):
        expected = read(model, ids[:, N_PREFIX:], turns)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert positions(cache) == positions(turns)
    assert all(kept[:N_PREFIX] == list(range(N_PREFIX)) for kept in positions(cache))
    n_kept, n_heads = sum(map(len, positions(cache))), len(positions(cache))
    assert n_kept < n_heads * (N_PREFIX + 0.6 * N_SPAN)


def test_a_budget_does_not_count_the_prefix() -> None:
    model, ids = tiny_model(), ids_of(N_PREFIX + N_SPAN)
    cache = prefix_read(model, ids)
    with KVzipPress(budget=10, n_sink=0)(model):
        read(model, ids[:, N_PREFIX:], cache)
    assert sum(map(len, positions(cache))) == 6 * (N_PREFIX + 10)


def test_while_decoding_no_head_loses_the_prefix() -> None:
    model, ids = tiny_model(), ids_of(N_PREFIX + N_SPAN)
    cache = prefix_read(model, ids)
    with press_of("decoding", model, 0.5)(model):
        model.generate(ids, past_key_values=cache, min_new_tokens=60, max_new_tokens=60, do_sample=False)
    assert all(kept[:N_PREFIX] == list(range(N_PREFIX)) for kept in positions(cache))
    assert RaggedCache.of(cache).get_seq_length() == N_PREFIX + N_SPAN + 59


def test_a_budget_that_the_prefix_fills_is_refused_before_anything_is_read() -> None:
    model, ids = tiny_model(), ids_of(N_PREFIX + N_SPAN)
    cache = prefix_read(model, ids)
    press = FastKVzipPress(decoding=True, budget=20, buffer=4, gate=random_gates(model))
    with press(model), pytest.raises(InvalidArgumentError, match="21 protected first tokens"):
        read(model, ids[:, N_PREFIX:], cache)
    assert cache.get_seq_length() == N_PREFIX


@pytest.mark.parametrize("name", ["kvzip", "fastkvzip", "random"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rows_of_different_length_are_what_each_is_alone(name: str, architecture: str) -> None:
    model, ids = tiny_model(architecture), ids_of(N_PREFIX + N_SPAN, batch=2)
    n_padding = 7
    mask = torch.ones_like(ids)
    mask[0, :n_padding] = 0
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    press, cache = press_of(name, model, 0.6), DynamicCache(config=model.config)
    before, span = slice(None, N_PREFIX), slice(N_PREFIX, None)
    read(model, ids[:, before], cache, attention_mask=mask[:, before], position_ids=where[:, before])
    with press(model):
        together = read(model, ids[:, span], cache, attention_mask=mask, position_ids=where[:, span])
    for row, first in ((0, n_padding), (1, 0)):
        alone = DynamicCache(config=model.config)
        read(model, ids[row : row + 1, first:N_PREFIX], alone)
        with press(model):
            logits = read(model, ids[row : row + 1, span], alone)
        torch.testing.assert_close(together[row], logits[0], **TOLERANCE)
        if name != "random":  # whose scores depend on the row's number
            assert positions(cache, row) == positions(alone)


def test_a_mask_that_leaves_the_prefix_out_is_refused() -> None:
    model, ids = tiny_model(), ids_of(N_PREFIX + N_SPAN)
    cache = prefix_read(model, ids)
    with RandomPress(0.5)(model), pytest.raises(InvalidArgumentError, match="over the 21 tokens in the cache and"):
        read(model, ids[:, N_PREFIX:], cache, attention_mask=torch.ones(1, N_SPAN, dtype=torch.long))
    assert cache.get_seq_length() == N_PREFIX


def test_attention_that_is_not_understood_is_seen_after_a_prefix_too() -> None:
    """The model's last query over prefix and span is computed again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    def with_a_sink(module, query, key, value, *args, **kwargs):
        output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)
        return output * 0.9, weights

    AttentionInterface.register("with_a_sink", with_a_sink)
    model, ids = tiny_model(attn_implementation="with_a_sink"), ids_of(N_PREFIX + N_SPAN)
    cache = prefix_read(model, ids)
    with RandomPress(0.5)(model), pytest.raises(UnsupportedModelError, match="differs from it"):
        read(model, ids[:, N_PREFIX:], cache)


@pytest.mark.kvpress
def test_a_press_that_needs_the_whole_context_says_so() -> None:
    model, ids = tiny_model(), ids_of(N_PREFIX + N_SPAN)
    cache = prefix_read(model, ids)
    with get_press("kvpress_kvzip", 0.5)(model), pytest.raises(InvalidArgumentError, match="21"):
        read(model, ids[:, N_PREFIX:], cache)
    assert cache.get_seq_length() == N_PREFIX
