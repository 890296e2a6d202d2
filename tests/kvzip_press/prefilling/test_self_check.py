"""A model whose attention is not what a ragged cache computes raises in its first prefill; the others pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from kvzip_press import RandomPress, compat, prefill
from kvzip_press.errors import UnsupportedModelError
from kvzip_press.prefilling.self_check import SelfCheck
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.testing import ARCHITECTURES, ByteTokenizer, tiny_model

Change = Callable[[torch.Tensor], torch.Tensor]
N = 40


def token_ids(batch: int = 1, length: int = N) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


def attention_with(change: Change, *, factor: float = 1.0) -> Callable[..., tuple[torch.Tensor, None]]:
    """Eager attention that changes its masked logits ``[batch, heads, queries, keys]`` before the softmax."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * scaling * factor
        if attention_mask is not None:
            logits = logits + attention_mask
        weights = change(logits.float()).softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), None

    return attention


def with_attention(function: Callable[..., object], name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)
    return tiny_model(attn_implementation=name, dtype=dtype)


def alibi(logits: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(logits.shape[3]) - (logits.shape[3] - 1)
    return logits + 0.1 * distance * torch.linspace(0.5, 1, logits.shape[1])[:, None, None]


def sink(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits, logits.amax(dim=-1, keepdim=True)], dim=-1)


def local(logits: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(logits.shape[2:], dtype=torch.bool).tril(-8)
    return logits.masked_fill(hidden, -torch.inf)


def one_head_capped(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits[:, :1].clamp(max=0.1), logits[:, 1:]], dim=1)


ODD = {"alibi": alibi, "sink": sink, "local": local, "one_head_capped": one_head_capped}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "sharper", *ODD])
def test_an_attention_that_adds_something_raises(name, dtype) -> None:
    """A bias, a sink, a local pattern, another scale, or one odd head; written out and plain, it passes."""
    factor = 1.4 if name == "sharper" else 1.0
    model = with_attention(attention_with(ODD.get(name, lambda x: x), factor=factor), f"odd_{name}", dtype)
    if name == "plain":
        with torch.no_grad(), RandomPress(0.5)(model):
            model(token_ids())
        return
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention \d: expected attention as softmax"):
        prefill(model, ByteTokenizer(), "a context of some length, long enough for a window")
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="would answer wrongly"), RandomPress(0.5)(model):
        model(token_ids())
    assert not model.model._forward_hooks


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_supported_model_passes(architecture, implementation, dtype, padding) -> None:
    """In every dtype and with padding, far from the limit."""
    if implementation == "sdpa" and not type(tiny_model(architecture, attn_implementation="eager"))._supports_sdpa:
        pytest.skip("this transformers knows no sdpa for it")
    model = tiny_model(architecture, attn_implementation=implementation, dtype=dtype)
    valid = torch.ones(2, N, dtype=torch.bool)
    if padding != "none":
        valid[1, slice(0, 9) if padding == "left" else slice(N - 9, N)] = False
    checks = []

    class Noted(SelfCheck):
        def finish(self, cache):
            checks.extend(float(seen.excess) for [seen] in self._seen.values())
            super().finish(cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvzip_press.prefilling.whole.SelfCheck", Noted)
        run_prefill(model, token_ids(2), valid)
    assert len(checks) == (2 if "layer_types" in ARCHITECTURES[architecture] else 3)
    assert max(checks) < 0.5


class CallsTwice(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        again, weights = super().forward(hidden_states, *args, **kwargs)
        output, _ = super().forward(
            hidden_states, *args, **{**kwargs, **compat.cache_argument(LlamaAttention, DynamicCache())}
        )
        return output + 0 * again, weights


class CallsNothing(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        keys, values = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        compat.cache_given(kwargs).update(keys, values, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class CachesOthers(LlamaAttention):
    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        layer = compat.cache_given(kwargs).layers[self.layer_idx]
        layer.keys = layer.keys * 1.5
        return result


@pytest.mark.parametrize(
    ("kind", "message"),
    [(CallsTwice, "got 2"), (CallsNothing, "got 0"), (CachesOthers, "the keys that are in its layer of the cache")],
)
def test_a_layer_that_attends_otherwise_raises(kind, message) -> None:
    """Twice in a forward, past the attention interface, or to other keys than those of the cache."""
    model = tiny_model()
    odd = kind(model.config, layer_idx=1).eval()
    odd.load_state_dict(model.model.layers[1].self_attn.state_dict())
    model.model.layers[1].self_attn = odd
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} 1.*{message}"):
        run_prefill(model, token_ids(), torch.ones(1, N, dtype=torch.bool))


def model_of(model_type: str, **options) -> nn.Module:
    common = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "num_hidden_layers": 2}
    config = AutoConfig.for_model(model_type, **common, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_attention_sinks_raise_before_a_token_is_evicted() -> None:
    """gpt-oss hands its sinks to the attention function: the error names them."""
    model = model_of("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="s_aux"), RandomPress(0.5)(model):
        model(token_ids())


def test_layers_that_keep_a_state_raise() -> None:
    """Linear attention writes its state in place: a replay or a question would change it for all that follow."""
    pytest.importorskip("transformers.models.qwen3_next")  # absent from the oldest transformers
    layer_types = ["linear_attention", "full_attention"]
    model = model_of("qwen3_next", layer_types=layer_types, num_experts=2, num_experts_per_tok=1)
    with pytest.raises(UnsupportedModelError, match="with linear_attention"):
        run_prefill(model, token_ids(), torch.ones(1, N, dtype=torch.bool))


def test_the_check_changes_no_bit_and_costs_no_forward() -> None:
    """Logits under a press are those without one, and each module runs once."""
    model, calls = tiny_model(), []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(token_ids()).logits
        calls.clear()
        with RandomPress(0.5)(model):
            assert torch.equal(model(token_ids()).logits, expected)
    assert len(calls) == 3


def test_infinities_are_the_models_own() -> None:
    """A model that overflows in fp16 is not blamed on its attention."""
    model = tiny_model(dtype=torch.float16)
    model.model.layers[0].self_attn.v_proj.weight.data.fill_(6e4)
    run_prefill(model, token_ids(), torch.ones(1, N, dtype=torch.bool))
