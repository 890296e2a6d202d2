"""Every attention implementation of a model works: its own for dense caches, ours for ragged ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from kvzip_press import RandomPress, attach, detach
from kvzip_press.attention.implementation import is_attached
from kvzip_press.cache.tail_mask import causal_mask, tail_mask
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.testing import tiny_model


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def generated(model, press=None) -> list[list[int]]:
    """What a model writes behind a left-padded batch of two."""
    model.generation_config.eos_token_id = None
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    if press is None:
        return model.generate(token_ids(2, 40), **options).tolist()
    with press(model):
        return model.generate(token_ids(2, 40), **options).tolist()


@pytest.fixture
def flash_stand_in():
    """An implementation like flash_attention_2: 2-D masks, and it reads its own name from the config."""
    names = []

    def forward(module, query, key, value, attention_mask, **kwargs):
        names.append(module.config._attn_implementation)
        q_len, k_len = query.shape[2], key.shape[2]
        mask = causal_mask(q_len, k_len, query.device)
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        return sdpa_attention_forward(module, query, key, value, mask.expand(query.shape[0], 1, -1, -1), **kwargs)

    AttentionInterface.register("flash_stand_in", forward)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    return names


def test_flash_attention_keeps_its_name_and_masks(flash_stand_in) -> None:
    """A flash implementation prefills by itself, and its 2-D masks serve the ragged layers."""
    model = tiny_model(attn_implementation="eager")
    model.config._attn_implementation = "flash_stand_in"
    assert generated(model, RandomPress(0.6)) == generated(tiny_model(), RandomPress(0.6))
    assert set(flash_stand_in) == {"flash_stand_in"} and len(flash_stand_in) == 3
    assert model.config._attn_implementation == "ragged|flash_stand_in"


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text"])
def test_on_a_cpu_flex_attention_is_computed_as_eager(architecture, monkeypatch) -> None:
    """What torch compiles flex_attention to on a CPU is never called: its result depends on memory behind the keys."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", refused)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flex_attention", refused)
    model = tiny_model(architecture, attn_implementation="flex_attention", num_layers=2)
    assert generated(model, RandomPress(0.6)) == generated(tiny_model(architecture, num_layers=2), RandomPress(0.6))
    eager = tiny_model(architecture, attn_implementation="eager", num_layers=2)
    with torch.no_grad():
        assert torch.equal(model(token_ids(1, 20)).logits, eager(token_ids(1, 20)).logits)  # still attached


def refused(*args, **kwargs):
    raise AssertionError("expected no call")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_an_attached_model_computes_what_it_did(architecture, implementation) -> None:
    """Attached, a model with dense caches gives bit for bit its own results; detached, it has its own name again."""
    model = tiny_model(architecture, attn_implementation=implementation)
    expected, ids = generated(model), token_ids(1, 20)
    with torch.no_grad():
        logits = model(ids).logits
        assert attach(model) and not attach(model) and is_attached(model)
        assert torch.equal(model(ids).logits, logits)
    assert generated(model) == expected
    detach(model)
    assert model.config._attn_implementation == implementation


def test_what_ragged_attention_does_not_know_is_refused() -> None:
    """Arguments that would change the result raise instead of being dropped."""
    model, cache = tiny_model(attention_dropout=0.5), DynamicCache()
    with torch.no_grad(), RandomPress(0.5)(model):
        model(token_ids(1, 20), past_key_values=cache)
    model.train()
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="dropout"):
        model(token_ids(1, 3), past_key_values=cache)


def test_tail_mask_of_every_kind() -> None:
    """Padding masks, bool and additive 4-D masks and block masks of the same meaning give the same tail mask."""
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, 4] = 0
    expected = causal_mask(3, 6, padding.device) & padding[:, None, None, -6:].bool()
    additive = torch.zeros(2, 1, 3, 6).masked_fill(~expected, torch.finfo(torch.float32).min)

    def visible(b, h, q, k):
        return expected[b, 0, q, k]

    block = create_block_mask(visible, 2, None, 3, 6, device="cpu")
    for mask in (padding, expected, additive, block):
        assert torch.equal(tail_mask(mask, query_length=3, tail_length=6), expected)
    assert tail_mask(None, query_length=3, tail_length=6) is None


def test_masks_of_another_shape_or_meaning_are_refused() -> None:
    """A mask that is too short, and one with biases that are neither 0 nor minus infinity, raise."""
    with pytest.raises(InvalidArgumentError, match="6 tail tokens"):
        tail_mask(torch.ones(1, 5), query_length=1, tail_length=6)
    with pytest.raises(InvalidArgumentError, match="other biases"):
        tail_mask(torch.full((1, 1, 1, 6), -0.5), query_length=1, tail_length=6)
