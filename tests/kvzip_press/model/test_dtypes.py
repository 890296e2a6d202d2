"""Half precision and quantized weights: caches follow the activations, and no stored weight is taken for a float."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from kvzip_press import KVzipPress, RaggedCache, RandomPress, answer, compress, prefill
from kvzip_press.errors import CacheMismatchError
from kvzip_press.model.identity import layer_fingerprint
from kvzip_press.model.structure import dense_weight
from kvzip_press.testing import ARCHITECTURES, ByteTokenizer, evicted_keys_masked, tiny_model

TEXT = "A context that is read once, in any precision that the model has."
# transformers' sdpa drops Gemma 2's soft-cap in the prefill; its eager attention is the model as published.
EAGER = {"gemma2": "eager"}


def token_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_errs_no_more_than_the_dense_model(architecture, dtype, keep_masks) -> None:
    """Against fp32 on the same weights and the same kept pairs: as close as the dense cache with masked keys is."""
    model = tiny_model(architecture, dtype=dtype, attn_implementation=EAGER.get(architecture, "sdpa"))
    ids, question = token_ids(48), token_ids(5, seed=1)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        with RandomPress(0.6)(model):
            model(ids, past_key_values=cache)
        keep = keep_masks(cache, torch.ones(1, 48, dtype=torch.bool))
        ours = model(question, past_key_values=cache).logits.float()
        assert RaggedCache.of(cache).seqlens(1).sum() == keep[1].sum() < 0.6 * keep[1].numel()
        assert next(RaggedCache.of(cache).ragged_layers())[1].packed.columns["keys"].dtype == dtype
        model = tiny_model(architecture, dtype=dtype, attn_implementation="eager")
        dense, exact = (masked_logits(model.to(kind), ids, question, keep) for kind in (dtype, torch.float32))
    assert (ours - exact).norm() <= 1.5 * (dense - exact).norm() + 1e-6 * exact.norm()


def masked_logits(model, ids, question, keep):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with evicted_keys_masked(model, keep):
        return model(question, past_key_values=cache).logits.float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kvzip_answers_saves_and_loads_in_half_precision(architecture, dtype, tmp_path) -> None:
    implementation = EAGER.get(architecture, "sdpa")
    model, tokenizer = tiny_model(architecture, dtype=dtype, attn_implementation=implementation), ByteTokenizer()
    check_whole_way(model, tokenizer, tmp_path / "cache.safetensors", dtype)


def check_whole_way(model, tokenizer, path, dtype) -> None:
    cache = compress(model, tokenizer, TEXT, KVzipPress(0.5, tokenizer=tokenizer))
    assert {layer.packed.columns["keys"].dtype for _, layer in cache.ragged_layers()} == {dtype}
    expected = answer(model, tokenizer, cache, "Which precision?", max_new_tokens=8)
    cache.save(path)
    loaded = RaggedCache.load(path, model)
    assert answer(model, tokenizer, loaded, "Which precision?", max_new_tokens=8) == expected


class FP8Linear(nn.Module):
    """Weights in fp8 with a scale a row, multiplied in the dtype of the activations, as in quantized checkpoints."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        self.weight = nn.Parameter((linear.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.float(), requires_grad=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.weight_scale).to(x.dtype))


class PackedLinear(nn.Module):
    """Weights as two 4-bit numbers a byte, in buffers: no parameter at all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        numbers = (linear.weight.detach() / scale).round().to(torch.int8) + 8
        self.register_buffer("qweight", (numbers[:, ::2] | (numbers[:, 1::2] << 4)).to(torch.uint8))
        self.register_buffer("scales", scale)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = torch.stack([self.qweight & 15, self.qweight >> 4], dim=-1).flatten(1).to(x.dtype) - 8
        return nn.functional.linear(x, numbers * self.scales.to(x.dtype))


def quantized(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    model = tiny_model(dtype=torch.bfloat16, seed=seed)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kind(child))
    return model


@pytest.mark.parametrize("kind", [FP8Linear, PackedLinear])
def test_a_model_with_quantized_weights_works_from_end_to_end(kind, tmp_path) -> None:
    """Compressed, asked, saved and loaded; the cache is in the dtype of the activations."""
    check_whole_way(quantized(kind), ByteTokenizer(), tmp_path / "cache.safetensors", torch.bfloat16)


@pytest.mark.parametrize("kind", [FP8Linear, PackedLinear])
def test_quantized_weights_tell_models_apart(kind) -> None:
    """A cache of one quantized model is refused by another, and taken by the same weights loaded again."""
    model, tokenizer = quantized(kind), ByteTokenizer()
    cache = compress(model, tokenizer, TEXT, RandomPress(0.5))
    expected = answer(model, tokenizer, cache, "Whose?", max_new_tokens=4)
    assert answer(copy.deepcopy(model), tokenizer, cache, "Whose?", max_new_tokens=4) == expected
    with pytest.raises(CacheMismatchError, match="made by another model"):
        answer(quantized(kind, seed=1), tokenizer, cache, "Whose?", max_new_tokens=4)


@pytest.mark.parametrize("kind", [FP8Linear, PackedLinear])
def test_kvzip_plus_weighs_with_the_matrix_that_is_meant(kind) -> None:
    """Its scores need the output projection: those of the same model with plain weights, not of the stored numbers."""
    model, plain = quantized(kind).float(), tiny_model()
    for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("self_attn", "mlp"):
            for part, child in getattr(theirs, name).named_children():
                if isinstance(child, nn.Linear):
                    child.weight.data = dense_weight(getattr(getattr(ours, name), part), torch.ones(1))
    plain.model.embed_tokens, plain.model.rotary_emb = model.model.embed_tokens, model.model.rotary_emb
    press = KVzipPress(0.5, kvzip_plus=True, tokenizer=ByteTokenizer())
    ours, theirs = (press.score(prefill(m, ByteTokenizer(), TEXT)).layers for m in (model, plain))
    for layer_idx, scores in theirs.items():
        torch.testing.assert_close(ours[layer_idx], scores, atol=1e-4, rtol=1e-3)


class ScaledInputsLinear(nn.Linear):
    """Inputs in fp8 with a scale a block, which divides 0 by 0 where a block is all zeros, as Hugging Face's fp8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(-1, (-1, 16))
        scale = blocks.abs().amax(dim=-1, keepdim=True) / 448
        stored = (blocks / scale).to(torch.float8_e4m3fn)
        return nn.functional.linear((stored.to(x.dtype) * scale).flatten(-2), self.weight, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_of_a_layer_that_scales_its_inputs_is_read_whole(dtype) -> None:
    layer = ScaledInputsLinear(64, 48, dtype=dtype)
    read = dense_weight(layer, torch.ones(1, dtype=dtype))
    torch.testing.assert_close(read, layer.weight.float(), atol=4 * torch.finfo(dtype).eps, rtol=1e-2)


def test_one_byte_of_an_fp8_weight_changes_the_fingerprint() -> None:
    """Bytes are compared, also where they stand for the same number as floats (0 and -0) or for none (NaN)."""
    module = quantized(FP8Linear).model.layers[0].self_attn
    bits = module.k_proj.weight.data.view(torch.uint8)
    seen = set()
    for byte in (0x00, 0x80, 0x7F, 0xFF):
        bits[0, 0] = byte
        seen.add(layer_fingerprint(module))
    assert len(seen) == 4
