"""Models and ways to run them that differ from the usual: they work as the model alone does, or are refused in time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kvzip_press import KVzipPress, RaggedCache, RandomPress, answer, compat, compress
from kvzip_press.errors import UnsupportedCacheError, UnsupportedModelError
from kvzip_press.testing import ByteTokenizer, evicted_keys_masked, tiny_model

TOKENIZER = ByteTokenizer()
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "d_model": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
}


def ids(n: int = 60, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (1, n), generator=torch.Generator().manual_seed(seed))


def build(kind: str) -> Any:
    fields = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{name: size for name, size in SIZES.items() if hasattr(fields, name)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def in_ways(model: Any, press: Any) -> list[Any]:
    """The two doors to a press, each as a function."""

    def generated() -> Any:
        with press(model):
            return model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)

    return [lambda: compress(model, TOKENIZER, ids()[0].tolist(), press), generated]


@pytest.mark.parametrize("kvzip_plus", [False, True])
@pytest.mark.parametrize("kind", ["opt", "persimmon", "phi", "biogpt", "bart"])
def test_models_that_name_their_parts_otherwise(kind, kvzip_plus) -> None:
    """No ``num_key_value_groups``, an output projection of another name: logits are those of the masked dense model."""
    model, press = build(kind), KVzipPress(0.5, kvzip_plus=kvzip_plus, tokenizer=TOKENIZER)
    cache, dense = compat.DynamicCache(config=model.config), compat.DynamicCache(config=model.config)
    with torch.no_grad():
        with press(model):
            model(ids(), **compat.cache_argument(model, cache))
        ours = model(ids(7, 2), **compat.cache_argument(model, cache)).logits
        keep = {}
        for layer_idx, _ in RaggedCache.of(cache).ragged_layers():
            heads = RaggedCache.of(cache).kept_positions(layer_idx)[0]
            keep[layer_idx] = torch.stack([torch.isin(torch.arange(60), positions) for positions in heads])[None]
        model(ids(), **compat.cache_argument(model, dense))
        with evicted_keys_masked(model, keep):
            expected = model(ids(7, 2), **compat.cache_argument(model, dense)).logits
    assert 0.4 < RaggedCache.of(cache).kept_fraction < 0.6
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_attention_without_an_output_projection_has_no_kvzip_plus() -> None:
    """It is said before the context is read, and with what the module has."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.leave, layer.self_attn.o_proj = layer.self_attn.o_proj, torch.nn.Identity()
    for way in in_ways(model, KVzipPress(0.5, kvzip_plus=True, tokenizer=TOKENIZER)):
        calls: list[int] = []
        handle = model.model.embed_tokens.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with pytest.raises(UnsupportedModelError, match=r"output projection.*got LlamaAttention with.*leave"):
            way()
        handle.remove()
        assert calls == []


def encoder_decoder() -> Any:
    config = transformers.BartConfig(**{name: size for name, size in SIZES.items() if name != "num_hidden_layers"})
    return transformers.BartForConditionalGeneration(config).eval()


def shared_layers() -> Any:
    model = tiny_model()
    model.model.layers[2].self_attn.is_kv_shared_layer = True
    return model


def checkpointing() -> Any:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    return model.train()


def virtual_tokens(kind: str) -> Any:
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind}TuningConfig")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(tiny_model(), config).eval()


REFUSED = {
    "an encoder-decoder": (encoder_decoder, "encoder-decoder BartFor"),
    "layers that share keys": (shared_layers, r"layers \[2\] use those of others"),
    "checkpoints in training": (checkpointing, r"gradient checkpointing.*model\.eval\(\)"),
    "a learned prefix": (lambda: virtual_tokens("Prefix"), "PrefixTuningConfig, which puts virtual tokens"),
    "a learned prompt": (lambda: virtual_tokens("Prompt"), "PromptTuningConfig, which puts virtual tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_press_can_compress_is_refused_before_anything_is_computed(name) -> None:
    make, message = REFUSED[name]
    model, calls = make(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    for way in (
        in_ways(model, RandomPress(0.5)) if name != "an encoder-decoder" else in_ways(model, RandomPress(0.5))[:1]
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            way()
    assert calls == []


def test_checkpoints_are_no_matter_outside_of_training() -> None:
    model = checkpointing().eval()
    assert compress(model, TOKENIZER, ids()[0].tolist(), RandomPress(0.5)).kept_fraction < 0.6


def test_a_config_without_a_cache_is_refused_unless_there_is_one() -> None:
    """``use_cache=False`` in the config: a forward that is given a cache fills it all the same."""
    model = tiny_model()
    model.config.use_cache = False
    cache = compat.DynamicCache(config=model.config)
    with torch.no_grad(), RandomPress(0.5)(model):
        model(ids(), **compat.cache_argument(model, cache))
    assert RaggedCache.of(cache).kept_fraction < 0.6
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedCacheError, match=r"config\.use_cache=False"),
        RandomPress(0.5)(model),
    ):
        model(ids())


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_autocast_is_judged_by_the_precision_that_it_computes_in(attn_implementation) -> None:
    """All kept, logits are as near to the exact ones as those of the dense model under autocast; half kept, it runs."""
    model = tiny_model(attn_implementation=attn_implementation)
    caches = [compat.DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        exact = model(torch.cat([ids(), ids(7, 2)], 1)).logits[:, -7:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with RandomPress(0.0)(model):
                model(ids(), **compat.cache_argument(model, caches[0]))
            model(ids(), **compat.cache_argument(model, caches[1]))
            ours, dense = (model(ids(7, 2), **compat.cache_argument(model, c)).logits.float() for c in caches)
    assert (ours - exact).norm() <= 1.5 * (dense - exact).norm()
    press = KVzipPress(0.5, tokenizer=TOKENIZER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = compress(model, TOKENIZER, ids()[0].tolist(), press)
        assert answer(model, TOKENIZER, cache, "What?", max_new_tokens=3)
        with press(model):
            model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert cache.kept_fraction < 0.6


@pytest.mark.parametrize("how", ["forward", "in place"])
def test_a_model_that_is_compiled_as_a_whole_runs_as_it_is_written(how) -> None:
    """Under a press and with a compressed cache; the same tokens as without ``torch.compile``."""
    press, written = KVzipPress(0.5, tokenizer=TOKENIZER), []
    for compiled in (False, True):
        model = tiny_model()
        model.generation_config.eos_token_id = None
        if compiled and how == "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        elif compiled:
            model.compile(backend="eager")
        cache = compress(model, TOKENIZER, ids()[0].tolist(), press)
        one = answer(model, TOKENIZER, cache, "What?", max_new_tokens=4)
        with press(model):
            written.append((one, model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0).tolist()))
    assert written[0] == written[1]
