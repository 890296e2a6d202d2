"""For tests of presses: small models of every supported architecture, and a slow reference for eviction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.model.structure import full_attention_layers, layer_index

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # logits that differ, so that a wrong key shows
}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}

#: Architecture -> what it needs beyond the common shape.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "gemma2": {**_HYBRID, "sliding_window": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_HYBRID, "sliding_window": 32, "query_pre_attn_scalar": 24},
}


def tiny_model(architecture: str = "llama", *, num_layers: int = 3, seed: int = 0, **options: Any) -> Any:
    """Returns a causal language model of an architecture with random weights, in eval mode on the CPU, in fp32.

    Args:
        architecture: A key of :data:`ARCHITECTURES`, transformers' model type.
        num_layers: Number of decoder layers; hybrid architectures always have four.
        seed: Seed of the weights.
        options: Further config values, including ``dtype`` and ``attn_implementation``: sdpa by default, eager for
            Gemma 2, which newer transformers refuse with sdpa.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = ARCHITECTURES[architecture]
    layers = len(extra["layer_types"]) if "layer_types" in extra else num_layers
    usual = "eager" if architecture == "gemma2" else "sdpa"
    attn_implementation, dtype = options.pop("attn_implementation", usual), options.pop("dtype", torch.float32)
    config = AutoConfig.for_model(architecture, **{**_COMMON, "num_hidden_layers": layers, **extra, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return model.to(dtype).eval()


@contextmanager
def evicted_keys_masked(model: nn.Module, keep: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """While open, a model (sdpa or eager) with a dense cache attends as if pairs had been evicted: the reference.

    Args:
        model: A model used with a dense cache of ``n`` context tokens and whatever follows, without padding after it.
        keep: ``layer_idx -> [batch, num_key_value_heads, n]``, bool: the context pairs that may be seen.
    """
    layers = [layer for layer in full_attention_layers(model) if layer.layer_idx in keep]

    def mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        kept = keep[layer_index(module)]
        states = args[0] if args else kwargs["hidden_states"]
        q_len, n_seen = states.shape[1], compat.cache_given(kwargs).get_seq_length(layer_index(module))
        if n_seen == 0:
            return None  # the prefill itself is dense
        tail = n_seen + q_len - kept.shape[-1]
        groups: Any = getattr(module, "num_key_value_groups", 1)  # without it, every head has keys of its own
        seen = kept.repeat_interleave(groups, dim=1)[:, :, None].expand(-1, -1, q_len, -1)
        causal = torch.ones(q_len, tail, dtype=torch.bool).tril(tail - q_len).expand(*seen.shape[:2], -1, -1)
        visible = torch.cat([seen, causal], dim=-1)
        additive = torch.zeros(visible.shape, dtype=states.dtype).masked_fill(~visible, torch.finfo(states.dtype).min)
        return args, {**kwargs, "attention_mask": additive}

    handles = [layer.module.register_forward_pre_hook(mask, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ByteTokenizer:
    """A tokenizer without files: one id per byte, folded into a small vocabulary. No chat template."""

    chat_template = None
    bos_token_id = 1
    eos_token_id = 2

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text."""
        return [3 + byte % 120 for byte in text.encode()]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Returns a printable form of ids."""
        return " ".join(str(i) for i in ids)
