"""Hugging Face's own fp8 (blocks of 128 x 128, multiplied in fp8): needs a GPU that can."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from kvzip_press import KVzipPress, RaggedCache, answer, compress, prefill
from kvzip_press.errors import CacheMismatchError
from kvzip_press.model.structure import dense_weight
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("kernels") is None, reason="transformers' fp8 layers need the package kernels"),
]

TEXT = "A context that is read once, in a precision that halves the weights. " * 8
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}


@pytest.fixture
def fp8_model(tmp_path):
    """Makes a llama whose linear layers are transformers' FP8Linear, by its own loading code."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    def load(seed: int = 0) -> nn.Module:
        folder = tmp_path / f"model{seed}"
        tiny_model(seed=seed, dtype=torch.bfloat16, **SHAPE).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=FineGrainedFP8Config(), device_map="cuda", dtype=torch.bfloat16
        ).eval()

    return load


def test_a_model_in_fp8_works_from_end_to_end(fp8_model, tmp_path) -> None:
    model, tokenizer = fp8_model(), ByteTokenizer()
    assert model.model.layers[0].self_attn.k_proj.weight.dtype == torch.float8_e4m3fn
    dense = prefill(model, tokenizer, TEXT)
    cache = compress(model, tokenizer, TEXT, KVzipPress(0.5, tokenizer=tokenizer))
    n_tokens = dense.valid.shape[1]
    kept = sum(int(cache.seqlens(index).sum()) for index in range(3)) / (3 * 2 * n_tokens)
    assert 0.5 <= kept < 0.51
    assert cache.resident_bytes < 0.55 * sum(4 * layer.keys.numel() for layer in dense.cache.layers)
    expected = answer(model, tokenizer, cache, "Which precision?", max_new_tokens=8)
    cache.save(tmp_path / "cache.safetensors")
    loaded = RaggedCache.load(tmp_path / "cache.safetensors", model)
    assert answer(model, tokenizer, loaded, "Which precision?", max_new_tokens=8) == expected
    with pytest.raises(CacheMismatchError, match="made by another model"):
        answer(fp8_model(seed=1), tokenizer, cache, "Which precision?", max_new_tokens=4)


def test_the_matrix_of_an_fp8_layer_is_read_through_its_scales(fp8_model) -> None:
    """As KVzip+ needs it: close to the weight that was quantized, which the stored numbers alone are not."""
    layer = fp8_model().model.layers[1].self_attn.o_proj
    plain = tiny_model(dtype=torch.bfloat16, **SHAPE).model.layers[1].self_attn.o_proj.weight.float()
    read = dense_weight(layer, torch.ones(1, dtype=torch.bfloat16, device="cuda")).cpu()
    assert (read - plain).norm() < 0.05 * plain.norm()
    assert (layer.weight.float().cpu() - plain).norm() > plain.norm()
