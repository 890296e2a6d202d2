"""kvpress's DecodingPress, real: what kvpress's own run keeps where both do the same thing, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, RaggedPress, RKVPress
from kvzip_press.decoding.generation import generate
from kvzip_press.errors import InvalidArgumentError

pytestmark = [pytest.mark.kvpress, pytest.mark.usefixtures("one_thread")]
HEADS, LAYERS = 2, 3


@torch.no_grad()
def step(model: Any, cache: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    positions = torch.arange(first, first + ids.shape[1])
    given = {"position_ids": positions[None], "cache_position": positions}
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **given).logits[:, -1]


def written(model: Any, press: Any, ids: torch.Tensor, prompt: int) -> tuple[list[torch.Tensor], list[int], Any]:
    """Logits of each step, how many pairs the first layer held a head behind it, and the cache."""
    cache, logits, held = DynamicCache(config=model.config), [], []
    with press(model):
        logits.append(step(model, cache, ids[:, :prompt], 0))
        for token in range(prompt, ids.shape[1]):
            logits.append(step(model, cache, ids[:, token : token + 1], token))
            layer = cache.layers[0]
            ragged = hasattr(layer, "packed")
            held.append(int(layer.packed.seqlens.max()) + layer.tail.length if ragged else layer.keys.shape[2])
    return logits, held, cache


#: Base press -> whether its scores depend on nothing but what is in the cache, in whatever order.
BASES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "KnormPress": (lambda k: k.KnormPress(), True),
    "KeyDiffPress": (lambda k: k.KeyDiffPress(), True),
    "TOVAPress": (lambda k: k.TOVAPress(), True),
    "SnapKVPress": (lambda k: k.SnapKVPress(window_size=4), False),
    "StreamingLLMPress": (lambda k: k.StreamingLLMPress(n_sink=2), False),
    "ExpectedAttentionPress": (lambda k: k.ExpectedAttentionPress(n_sink=0, n_future_positions=8), True),
}


@pytest.mark.parametrize("name", BASES)
def test_steps_are_those_of_kvpress(name, kvpress, tiny_model, context) -> None:
    """Logit for logit and pair for pair: over three evictions, or up to the second where scores depend on kvpress's
    order, which is that of the scores of the eviction before it. (The prompt is below the target first.)"""
    make, in_any_order = BASES[name]
    press = kvpress.DecodingPress(make(kvpress), compression_interval=12, target_size=40)
    model, ids = tiny_model(), context(70 if in_any_order else 55)
    expected, lengths, _ = written(tiny_model(), press, ids, 31)
    got, held, cache = written(model, RaggedPress(press), ids, 31)
    assert held == lengths and max(held) == 51 and held[11] == 40
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    assert RaggedCache.of(cache).resident_bytes < 2 * (2 * 16 * 4 + 8) * HEADS * LAYERS * 52


def test_a_ratio_of_what_was_seen_is_kept(kvpress, tiny_model, context) -> None:
    press = kvpress.CompressionRatioDecodingPress(
        kvpress.KnormPress(), target_compression_ratio=0.4, compression_interval=10
    )
    ids = context(65)
    expected, lengths, _ = written(tiny_model(), press, ids, 30)
    got, held, _ = written(tiny_model(), RaggedPress(press), ids, 30)
    assert held == lengths and [held[9], held[19], held[29]] == [24, 30, 36]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), atol=2e-4, rtol=2e-4)


def test_one_press_for_the_prompt_and_one_for_the_answer(kvpress, tiny_model, context) -> None:
    press = kvpress.PrefillDecodingPress(
        kvpress.KnormPress(0.5), kvpress.DecodingPress(kvpress.KeyDiffPress(), compression_interval=8, target_size=20)
    )
    ids = context(66)
    expected, lengths, _ = written(tiny_model(), press, ids, 50)
    got, held, _ = written(tiny_model(), RaggedPress(press), ids, 50)
    assert held == lengths and held[0] == 26 and held[7] == 20
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("ratio", [None, 0.4])
def test_rows_of_a_batch_are_what_they_are_alone(ratio, kvpress, tiny_model, context) -> None:
    """A padded prompt: each row has its own target, and kvpress's scores of its own pairs."""
    options: dict[str, Any] = {"compression_interval": 8}
    made = (
        kvpress.DecodingPress(kvpress.SnapKVPress(window_size=4), target_size=24, **options)
        if ratio is None
        else kvpress.CompressionRatioDecodingPress(
            kvpress.SnapKVPress(window_size=4), target_compression_ratio=ratio, **options
        )
    )
    press, model, rows = RaggedPress(made), tiny_model(), [context(40)[0], context(28, seed=5)[0]]
    padded = torch.stack([rows[0], torch.cat([torch.zeros(12, dtype=torch.int64), rows[1]])])
    caches = []
    for ids in (padded, rows[0][None], rows[1][None]):
        cache = DynamicCache(config=model.config)
        with press(model), torch.no_grad():
            mask = (ids > 0).long()
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            generate(model, RaggedCache.of(cache), [[7, 8, 9]] * len(ids), 17)
        caches.append(RaggedCache.of(cache))
    for row, alone in enumerate(caches[1:]):
        for layer_idx in range(LAYERS):
            both = zip(caches[0].kept_positions(layer_idx)[row], alone.kept_positions(layer_idx)[0], strict=True)
            assert all(torch.equal(one, other) for one, other in both)


def test_what_scores_cannot_say_is_refused_with_its_reason(kvpress, tiny_model, context) -> None:
    """Bases that do not only score, that need all attention, prompts of ragged heads, padding, and forks."""
    decoding, model, ids = kvpress.DecodingPress, tiny_model(), context(60)
    for base, reason in (
        (kvpress.AdaKVPress(kvpress.SnapKVPress(window_size=4)), "different numbers of pairs"),
        (kvpress.ObservedAttentionPress(), "attention of every query"),
        (kvpress.PyramidKVPress(window_size=4), "does not only score"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"inside a DecodingPress cannot be made real: .*{reason}"):
            RaggedPress(decoding(base))
    press = RaggedPress(
        kvpress.PrefillDecodingPress(kvpress.AdaKVPress(kvpress.KnormPress(0.5)), decoding(kvpress.KnormPress(), 4, 20))
    )
    with press(model), pytest.raises(InvalidArgumentError, match="heads of different length"):
        cache = DynamicCache(config=model.config)
        step(model, cache, ids[:, :50], 0)
        step(model, cache, ids[:, 50:51], 50)
    press = RaggedPress(decoding(kvpress.SnapKVPress(window_size=4), 8, 20))
    with press(model), pytest.raises(InvalidArgumentError, match="hidden_states_buffer_size=0"):
        cache = DynamicCache(config=model.config)
        step(model, cache, ids[:, :30], 0)
        for token in range(30, 34):
            step(model, cache, ids[:, token : token + 1], token)
        fork = RaggedCache.of(cache).fork()
        for token in range(34, 40):
            step(model, fork, ids[:, token : token + 1], token)
    press = RaggedPress(decoding(kvpress.SnapKVPress(window_size=40), 8, 20))
    with pytest.raises(InvalidArgumentError, match=r"SnapKVPress.*while the model writes"), press(model):
        cache = DynamicCache(config=model.config)
        step(model, cache, ids[:, :3], 0)
        for token in range(3, 20):
            step(model, cache, ids[:, token : token + 1], token)


def test_tokens_that_are_cropped_leave_no_trace(kvpress, tiny_model, context) -> None:
    """Hidden states of what was taken back are forgotten, and other caches in between are not looked at."""
    press = RaggedPress(kvpress.DecodingPress(kvpress.SnapKVPress(window_size=4), 8, 20))
    model, ids = tiny_model(), context(60)
    expected = written(model, press, ids[:, :42], 30)[0][-1]
    cache = DynamicCache(config=model.config)
    with press(model):
        step(model, cache, ids[:, :30], 0)
        for token in range(30, 42):
            if token == 33:
                step(model, cache, ids[:, 50:52], 33)
                cache.crop(-2)
                step(model, DynamicCache(config=model.config), ids[:, :20], 0)
            got = step(model, cache, ids[:, token : token + 1], token)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_it_is_no_press_for_the_prompt_of_another(kvpress) -> None:
    press = RaggedPress(kvpress.DecodingPress(kvpress.KnormPress(), 8, 20))
    assert press.evicts_while_decoding and press.schedule is not None and press.schedule.limit == 28
    with pytest.raises(InvalidArgumentError, match="compresses a prompt"):
        RKVPress(budget=64, prompt=press)
