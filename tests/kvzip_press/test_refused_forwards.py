"""Forwards that would give a silent wrong answer behind a press or a compressed cache: refused, always the same way."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import compress
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError
from kvzip_press.presses.kvzip import KVzipPress
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()


def repeating_ids() -> torch.Tensor:
    """A prompt in which look-up finds candidates."""
    return torch.tensor([[5, 6, 7, 8, 9, 10] * 8])


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("way", ["look-up", "assistant"])
def test_assisted_decoding_inside_a_press_is_refused_before_anything_is_read(way: str, ratio: float) -> None:
    model, ids = tiny_model(), repeating_ids()
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3} if way == "look-up" else {"assistant_model": tiny_model()}
    cache = DynamicCache(config=model.config)
    with KVzipPress(ratio)(model), pytest.raises(UnsupportedCacheError, match="assisted decoding or prompt look-up"):
        model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, **options)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("accepted", ["all", "some"])
def test_assisted_decoding_after_a_press_gives_what_it_gives_behind_a_dense_cache(accepted: str) -> None:
    """All candidates of an assistant that is the model itself are accepted; of one with other weights, some.

    transformers 5.24 itself says something else with an assistant than without one, behind any cache that was filled.
    """
    model, ids = tiny_model(), repeating_ids()
    assistant = tiny_model(seed=0 if accepted == "all" else 1)
    said = []
    for ratio in (None, 0.0):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), RandomPress(ratio)(model) if ratio is not None else nullcontext():
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
        options = {"past_key_values": cache, "max_new_tokens": 12, "do_sample": False}
        said.append(model.generate(ids, assistant_model=assistant, **options).tolist())
    assert said[0] == said[1]
    assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)


def test_gradients_behind_a_compressed_cache_are_refused() -> None:
    """Keys and values in a cache have no history, so what came back would be a part of the gradient."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, list(range(5, 65)), RandomPress(0.5))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UnsupportedCacheError, match=r"torch.no_grad\(\)"):
        model(ids, past_key_values=cache.fork(), use_cache=True)
    with pytest.raises(UnsupportedCacheError, match=r"torch.no_grad\(\)"):
        model(inputs_embeds=torch.randn(1, 3, 64, requires_grad=True), past_key_values=cache.fork(), use_cache=True)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache.fork(), use_cache=True).logits
    model.requires_grad_(False)
    model.model.layers[2].self_attn.v_proj.weight.requires_grad_(True)  # the last layer's: no query depends on it
    with pytest.raises(UnsupportedCacheError, match=r"torch.no_grad\(\)"):
        model(ids, past_key_values=cache.fork(), use_cache=True)
    model.requires_grad_(False)
    assert torch.equal(model(ids, past_key_values=cache.fork(), use_cache=True).logits, expected)  # nothing to train


def test_a_refused_forward_with_gradients_leaves_the_cache_as_it_was() -> None:
    model = tiny_model()
    cache = compress(model, TOKENIZER, list(range(5, 65)), RandomPress(0.5))
    with pytest.raises(UnsupportedCacheError, match=r"torch.no_grad\(\)"):
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    assert not any(layer.tail.length for layer in cache.layers)


def test_a_prefill_with_gradients_gives_them_as_without_a_press() -> None:
    model, ids = tiny_model(), repeating_ids()
    with RandomPress(0.5)(model):
        model(ids, use_cache=True).logits[:, -1].sum().backward()
    got = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(ids, use_cache=True).logits[:, -1].sum().backward()
    torch.testing.assert_close(got, model.model.layers[0].self_attn.k_proj.weight.grad)


def test_a_compiled_model_called_on_a_compressed_cache_is_told_how_to_be_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the tracer of torch.compile does first to a ragged layer's keys; a real one takes most of a minute here."""
    layer = compress(tiny_model(num_layers=1), TOKENIZER, list(range(3, 40)), RandomPress(0.5)).layers[0]
    keys, _ = layer.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    with pytest.raises(CacheMismatchError, match=r"call kvzip_press\.attach"):
        keys.is_nested  # noqa: B018
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(CacheMismatchError, match=r"got one that torch\.compile traces: let kvzip_press\.generate"):
        keys.is_nested  # noqa: B018
