"""Multimodal wrappers: their language model is compressed; text needs nothing else, images are the user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from kvzip_press import KVzipPress, RaggedCache, RandomPress, answer, compress
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.testing import ByteTokenizer

TEXT = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": 512, "initializer_range": 0.3}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
VISION |= {"image_size": 32, "patch_size": 8, "projection_dim": 32}
IMAGE = 120
ROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}


def build(name: str) -> Any:
    """A tiny wrapper of a kind with random weights."""
    if name == "gemma3":
        layer_types = ["sliding_attention", "full_attention"] * 2
        text = {**TEXT, "head_dim": 16, "sliding_window": 32, "layer_types": layer_types, "query_pre_attn_scalar": 24}
        config = transformers.Gemma3Config(
            text_config=text,
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            boi_token_index=121,
            eoi_token_index=122,
        )
    elif name == "llava":
        vision = {**VISION, "model_type": "clip_vision_model"}
        config = transformers.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"}, vision_config=vision, image_token_index=IMAGE
        )
    else:
        rope = {"rope_parameters" if transformers.__version__[0] == "5" else "rope_scaling": ROPE}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1, "patch_size": 8}
        vision |= {"spatial_merge_size": 1, "temporal_patch_size": 1}
        config = transformers.Qwen2VLConfig(
            text_config={**TEXT, **rope},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=123,
            vision_start_token_id=121,
            vision_end_token_id=122,
        )
    kinds = {"gemma3": transformers.Gemma3ForConditionalGeneration, "llava": transformers.LlavaForConditionalGeneration}
    kind = kinds.get(name, transformers.Qwen2VLForConditionalGeneration)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
    model.generation_config.eos_token_id = None
    return model


NAMES = ["gemma3", "llava", "qwen2_vl"]
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


def token_ids(batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 100, (batch, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_generate_under_a_press(name) -> None:
    """Everything kept, a padded batch writes what it does without a press; KVzip finds the tokens it has to repeat."""
    model, ids, mask = build(name), token_ids(2), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    expected = model.generate(ids, attention_mask=mask, **OPTIONS).sequences
    with RandomPress(0.0)(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **OPTIONS).sequences, expected)
    with KVzipPress(0.5, tokenizer=ByteTokenizer())(model):
        cache = RaggedCache.of(model.generate(ids, attention_mask=mask, **OPTIONS).past_key_values)
    assert 0.5 < cache.kept_fraction < 0.6
    assert len(list(cache.ragged_layers())) == (2 if name == "gemma3" else 4)


@pytest.mark.parametrize("name", NAMES)
def test_compress_and_answer(name) -> None:
    """A context is read through the language model, and questions go through the whole model: as without a press."""
    model, tokenizer = build(name), ByteTokenizer()
    text = "some context for a model that could also look at images"
    cache = compress(model, tokenizer, text, RandomPress(0.0))
    ids = [1, *tokenizer.encode(text), *tokenizer.encode("\n\nwhat?"), *tokenizer.encode("\n")]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    written = model.generate(torch.tensor([ids]), **OPTIONS).sequences[0, len(ids) :].tolist()
    written = written[: written.index(2)] if 2 in written else written
    assert answer(model, tokenizer, cache, "what?", max_new_tokens=6) == tokenizer.decode(written)
    smaller = compress(model, tokenizer, text, KVzipPress(0.7, tokenizer=tokenizer))
    assert smaller.resident_bytes < cache.resident_bytes
    assert answer(model, tokenizer, smaller, "what?", max_new_tokens=6)


@pytest.mark.parametrize("name", NAMES)
def test_several_questions_at_once_are_answered_as_one_by_one(name) -> None:
    """Questions of different lengths are read as a padded block, through layers that stand in for the cache's."""
    model, tokenizer = build(name), ByteTokenizer()
    cache = compress(model, tokenizer, "a context that several questions are about, all at once", RandomPress(0.3))
    questions = ["what?", "and where was it, then?", "who?"]
    alone = [answer(model, tokenizer, cache, question, max_new_tokens=4) for question in questions]
    assert answer(model, tokenizer, cache, questions, max_new_tokens=4) == alone


def with_image(model: Any) -> dict[str, torch.Tensor]:
    n_image = {"gemma3": 4, "llava": 16}[model.config.model_type]
    ids = token_ids()
    ids[0, 10 : 10 + n_image] = IMAGE
    types = {"token_type_ids": (ids == IMAGE).long()} if model.config.model_type == "gemma3" else {}
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32), **types}


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_images_are_kept_and_evicted_like_text(name) -> None:
    """A press that does not repeat tokens compresses a prompt with an image; all kept, nothing changes."""
    model = build(name)
    inputs = with_image(model)
    expected = model.generate(**inputs, **OPTIONS).sequences
    with RandomPress(0.0)(model):
        assert torch.equal(model.generate(**inputs, **OPTIONS).sequences, expected)
    with RandomPress(0.6)(model):
        assert 0.4 < RaggedCache.of(model.generate(**inputs, **OPTIONS).past_key_values).kept_fraction < 0.6


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_kvzip_does_not_repeat_an_image_as_if_it_were_text(name) -> None:
    """The ids of an image are placeholders: a replay of them would score what was never read."""
    model = build(name)
    with (
        pytest.raises(InvalidArgumentError, match="inputs_embeds only"),
        KVzipPress(0.5, tokenizer=ByteTokenizer())(model),
    ):
        model.generate(**with_image(model), **OPTIONS)


def test_positions_on_several_axes_raise_before_anything_is_read() -> None:
    """M-RoPE with an image gives tokens different positions on each axis; text alone has one."""
    model, ids = build("qwen2_vl"), token_ids()
    decoder = model.model.language_model
    positions = torch.arange(60).expand(3, 1, -1).clone()
    with torch.no_grad(), RandomPress(0.5)(model):
        cache = decoder(input_ids=ids, position_ids=positions).past_key_values
        assert RaggedCache.of(cache).kept_positions(0)[0][0].max() < 60
    positions[1, 0, 10:] -= 3
    calls = []
    decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), pytest.raises(InvalidArgumentError, match="M-RoPE"), RandomPress(0.5)(model):
        decoder(input_ids=ids, position_ids=positions)
    assert calls == []
