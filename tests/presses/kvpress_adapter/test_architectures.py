"""The same on models other than Llama, hybrid ones included."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from kvzip_press import RaggedPress, compress
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.kvpress

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def tiny(architecture: str, suffix: str = "", **options: Any) -> Any:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(1)
    config = getattr(transformers, f"{architecture}{suffix}Config")(**SHAPE, **options)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


@pytest.mark.parametrize("architecture", ["Mistral", "Phi3", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("name", ["SnapKVPress", "AdaKVPress", "KVzipPress"])
def test_keeps_what_kvpress_keeps(
    architecture: str, name: str, make_press: Any, context: Any, native: Any, keep_of: Any, tokenizer_folder: Any
) -> None:
    options = {"head_dim": 16} if architecture in ("Mistral", "Qwen3") else {}
    if architecture == "Mistral":
        options["sliding_window"] = None  # type: ignore[assignment]
    model, press, ids = tiny(architecture, **options), make_press(name), context()
    model.config.name_or_path = str(tokenizer_folder)
    ragged, expected = RaggedPress(press), native(model, press, ids)
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool), observers=[ragged])
    cache = done.evict(ragged.score(done))
    if expected.kept is not None:
        assert all(map(torch.equal, keep_of(cache), expected.kept))
    with torch.no_grad():
        logits = model(torch.tensor([[11]]), past_key_values=cache, position_ids=torch.tensor([[150]])).logits[0, -1]
    torch.testing.assert_close(logits, expected.logits(11), atol=1e-4, rtol=1e-4)


def test_only_full_layers_of_a_hybrid_model_are_compressed(make_press: Any, context: Any) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny("Gemma3", "Text", head_dim=16, layer_types=types, sliding_window=32)
    ids = context()
    for name in ("SnapKVPress", "AdaKVPress", "PyramidKVPress"):
        ragged = RaggedPress(make_press(name))
        done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool), observers=[ragged])
        cache = done.evict(ragged.score(done))
        assert [isinstance(layer, RaggedLayer) for layer in cache.layers] == [False, True, False]
        assert int(cache.seqlens(1).sum()) == 120  # 0.4 of 300, for PyramidKV too: it is the middle one of three layers


@pytest.mark.parametrize("options", [{"partial_rotary_factor": 0.5}, {"dtype": torch.bfloat16}], ids=["rotary", "bf16"])
def test_a_model_that_a_press_s_arithmetic_does_not_fit_is_refused(options: Any, make_press: Any) -> None:
    """kvpress's SnapKV turns all of a head, and pads with a number that bf16 does not hold on some devices."""
    model, context = tiny_model("phi3", **options), list(range(3, 103))
    with pytest.raises(InvalidArgumentError, match=r"SnapKVPress.*refused in layer 0: RuntimeError"):
        compress(model, ByteTokenizer(), context, RaggedPress(make_press("SnapKVPress")))
