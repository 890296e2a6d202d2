"""Sliding layers hold their window in memory, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, RandomPress
from kvzip_press.cache.sliding_windows import own_window, windows_only
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.testing import tiny_model

N_TOKENS, WINDOW = 200, 32


def held_bytes(layer) -> int:
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (layer.keys, layer.values)}.values()
    )


def window_bytes(layer) -> int:
    return 2 * (WINDOW - 1) * layer.keys[0, :, 0].nbytes


def sliding_layers(cache):
    return [layer for layer in cache.layers if getattr(layer, "sliding_window", None) == WINDOW]


def context():
    return torch.randint(3, 128, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_a_prefill_and_what_is_evicted_of_it_hold_windows_only(architecture) -> None:
    """transformers' own prefill holds all tokens of sliding layers: a cache's bytes would be a claim."""
    model = tiny_model(architecture, attn_implementation="eager")
    done = run_prefill(model, context(), torch.ones(1, N_TOKENS, dtype=torch.bool))
    cache = done.evict(RandomPress(0.7).score(done))
    for layers in (sliding_layers(done.cache), sliding_layers(cache)):
        assert len(layers) == 2
        assert [held_bytes(layer) for layer in layers] == [window_bytes(layer) for layer in layers]
    windows = sum(held_bytes(layer) for layer in sliding_layers(cache))
    assert cache.resident_bytes - windows < 0.35 * sum(layer.dense_bytes for _, layer in cache.ragged_layers())


def test_a_press_around_a_forward_leaves_windows_only() -> None:
    model = tiny_model("gemma3_text")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), RandomPress(0.7)(model):
        model(context(), past_key_values=cache)
    assert [held_bytes(layer) for layer in sliding_layers(cache)] == [window_bytes(x) for x in sliding_layers(cache)]
    assert RaggedCache.of(cache).kept_fraction < 0.4


def test_a_window_is_let_go_of_while_the_next_layers_are_read() -> None:
    """So the peak of a prefill falls too, not only what is left of it."""
    model = tiny_model("gemma3_text")
    cache, held = DynamicCache(config=model.config), []
    model.model.layers[3].register_forward_hook(lambda *_: held.extend(held_bytes(x) for x in sliding_layers(cache)))
    with torch.no_grad(), windows_only(model, cache):
        model(context(), past_key_values=cache)
    assert held == [window_bytes(layer) for layer in sliding_layers(cache)]
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_a_tensor_of_its_own_is_not_copied() -> None:
    model = tiny_model()
    done = run_prefill(model, context(), torch.ones(1, N_TOKENS, dtype=torch.bool))
    [layer, *_] = done.cache.layers
    keys = layer.keys
    own_window(layer)
    assert layer.keys is keys
