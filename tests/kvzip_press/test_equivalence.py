"""A ragged cache answers exactly as a dense cache whose evicted keys are masked, on every architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, RandomPress
from kvzip_press.testing import ARCHITECTURES, evicted_keys_masked, tiny_model

N_CONTEXT = 48
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
# transformers' sdpa drops Gemma 2's soft-cap in the prefill; its eager attention is the model as published.
CASES = [(a, i) for a in ARCHITECTURES for i in ("sdpa", "eager") if (a, i) != ("gemma2", "sdpa")]


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of these lengths, padded on the left to the longest."""
    ids, mask = token_ids(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids.masked_fill(mask == 0, 0), mask


def masked_dense_logits(model, ids, mask, keep, question):
    """Logits of a question after a dense prefill, evicted keys masked; positions as the mask says."""
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        full = torch.cat([mask, torch.ones_like(question)], dim=1)
        with evicted_keys_masked(model, keep):
            after = positions[:, -1:] + 1 + torch.arange(question.shape[1])
            return model(input_ids=question, attention_mask=full, position_ids=after, past_key_values=cache).logits


def ragged_logits(model, ids, mask, press, question, cache=None):
    """Logits of a question after a prefill under a press, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with press(model):
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        full = torch.cat([mask, torch.ones_like(question)], dim=1)
        after = positions[:, -1:] + 1 + torch.arange(question.shape[1])
        logits = model(input_ids=question, attention_mask=full, position_ids=after, past_key_values=cache).logits
    return logits, cache


@pytest.mark.parametrize("question_length", [1, 7])
@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_logits_equal_masked_dense(architecture, implementation, question_length, keep_masks) -> None:
    """The logits of a question equal those of the dense cache with evicted keys masked."""
    model = tiny_model(architecture, attn_implementation=implementation)
    ids, mask = token_ids(1, N_CONTEXT), torch.ones(1, N_CONTEXT, dtype=torch.long)
    question = token_ids(1, question_length, seed=1)
    logits, cache = ragged_logits(model, ids, mask, RandomPress(0.6), question)
    keep = keep_masks(cache, mask.bool())
    model = tiny_model(architecture, attn_implementation="eager")
    torch.testing.assert_close(logits, masked_dense_logits(model, ids, mask, keep, question), **TOLERANCE)
    assert 0.35 < RaggedCache.of(cache).kept_fraction < 0.6


@pytest.mark.parametrize("question_length", [1, 7])
@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_padded_batch_equals_masked_dense(architecture, implementation, question_length, keep_masks) -> None:
    """The same for a batch of three rows of unequal length."""
    model = tiny_model(architecture, attn_implementation=implementation)
    ids, mask = left_padded([N_CONTEXT, 31, 40])
    question = token_ids(3, question_length, seed=1)
    logits, cache = ragged_logits(model, ids, mask, RandomPress(0.6), question)
    keep = keep_masks(cache, mask.bool())
    model = tiny_model(architecture, attn_implementation="eager")
    torch.testing.assert_close(logits, masked_dense_logits(model, ids, mask, keep, question), **TOLERANCE)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_padded_row_equals_row_alone(architecture, padding) -> None:
    """Each row of a padded batch keeps what the row alone keeps; a left-padded row also answers the same."""
    model, press = tiny_model(architecture), RandomPress(0.6)
    ids, mask = left_padded([N_CONTEXT, 31, 40])
    if padding == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    question = token_ids(3, 5, seed=1)
    together, cache = ragged_logits(model, ids, mask, press, question)
    for row in range(3):
        own = ids[row : row + 1, mask[row].bool()]
        alone, own_cache = ragged_logits(model, own, torch.ones_like(own), press, question[row : row + 1])
        for layer_idx, _ in RaggedCache.of(cache).ragged_layers():
            ours = RaggedCache.of(cache).kept_positions(layer_idx)[row]
            theirs = RaggedCache.of(own_cache).kept_positions(layer_idx)[0]
            assert [p.tolist() for p in ours] == [p.tolist() for p in theirs]
        if padding == "left":
            torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_equals_masked_dense(architecture, num_beams, keep_masks) -> None:
    """`with press(model): model.generate(...)` writes what generate writes from the masked dense cache."""
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": num_beams, "return_dict_in_generate": True}
    ids, mask = left_padded([N_CONTEXT, 37])
    model = tiny_model(architecture, attn_implementation="eager" if architecture == "gemma2" else "sdpa")
    model.generation_config.eos_token_id = None
    with RandomPress(0.6)(model):
        ours = model.generate(input_ids=ids, attention_mask=mask, **options)
    keep = keep_masks(ours.past_key_values, mask.bool().repeat_interleave(num_beams, 0))
    reference = tiny_model(architecture, attn_implementation="eager")
    reference.generation_config.eos_token_id = None
    with evicted_keys_masked(reference, keep):
        theirs = reference.generate(input_ids=ids, attention_mask=mask, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype, keep_masks) -> None:
    """In bf16 and fp16 the ragged logits are as near to fp32 as the masked dense ones of that precision."""
    ids, mask = token_ids(1, N_CONTEXT), torch.ones(1, N_CONTEXT, dtype=torch.long)
    question = token_ids(1, 7, seed=1)
    model = tiny_model("llama", dtype=dtype)
    logits, cache = ragged_logits(model, ids, mask, RandomPress(0.6), question)
    keep = keep_masks(cache, mask.bool())
    exact = masked_dense_logits(tiny_model("llama", dtype=dtype).float(), ids, mask, keep, question)
    dense = masked_dense_logits(tiny_model("llama", dtype=dtype), ids, mask, keep, question)
    error = (logits.float() - exact).abs().max()
    budget = (dense.float() - exact).abs().max()
    assert error <= 2 * budget + 1e-4


def test_generate_after_the_context_manager(keep_masks) -> None:
    """A cache compressed in place serves `model.generate(full_ids, past_key_values=cache)` when the press has ended."""
    model, cache = tiny_model(), DynamicCache()
    model.generation_config.eos_token_id = None
    ids, question = token_ids(1, N_CONTEXT), token_ids(1, 6, seed=1)
    with torch.no_grad(), RandomPress(0.6)(model):
        model(ids, past_key_values=cache)
    full = torch.cat([ids, question], dim=1)
    keep = keep_masks(cache, torch.ones_like(ids).bool())
    first = model.generate(full, past_key_values=cache, max_new_tokens=5, do_sample=False)
    RaggedCache.of(cache).truncate(N_CONTEXT)
    again = model.generate(full, past_key_values=cache, max_new_tokens=5, do_sample=False)
    reference, dense = tiny_model(), DynamicCache()
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        reference(ids, past_key_values=dense)
    with evicted_keys_masked(reference, keep):
        expected = reference.generate(full, past_key_values=dense, max_new_tokens=5, do_sample=False)
    assert first.tolist() == again.tolist() == expected.tolist()


def test_ratio_zero_is_identity() -> None:
    """Nothing removed: the logits are those of the untouched model."""
    model = tiny_model()
    ids, mask = token_ids(1, N_CONTEXT), torch.ones(1, N_CONTEXT, dtype=torch.long)
    question = token_ids(1, 7, seed=1)
    logits, _ = ragged_logits(model, ids, mask, RandomPress(0.0), question)
    with torch.no_grad():
        expected = tiny_model()(torch.cat([ids, question], dim=1)).logits[:, -7:]
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_cache_without_config_on_a_hybrid_model() -> None:
    """A DynamicCache made without the model's config works on a hybrid model, and its sliding layers shrink too."""
    model, press = tiny_model("gemma3_text"), RandomPress(0.6)
    ids, mask = token_ids(1, N_CONTEXT), torch.ones(1, N_CONTEXT, dtype=torch.long)
    question = token_ids(1, 7, seed=1)
    with_config, _ = ragged_logits(model, ids, mask, press, question)
    without, cache = ragged_logits(model, ids, mask, press, question, cache=DynamicCache())
    torch.testing.assert_close(without, with_config, **TOLERANCE)
    assert cache.layers[0].keys.shape[2] == model.config.sliding_window - 1


def test_chunked_prefill_without_mask_is_lower_right_causal() -> None:
    """Without a mask, a multi-token forward behind a cache sees exactly the past and itself."""
    model = tiny_model()
    ids = token_ids(1, N_CONTEXT)
    cache = DynamicCache()
    with torch.no_grad():
        with RandomPress(0.0)(model):
            model(ids[:, :20], past_key_values=cache)
        first = model(ids[:, 20:33], past_key_values=cache).logits
        second = model(ids[:, 33:], past_key_values=cache).logits
        expected = tiny_model()(ids).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected[:, 20:], **TOLERANCE)
