"""SmolLM2's GGUF: architecture ``llama`` with a byte-level BPE tokenizer that splits digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from kvzip_press.loading.gguf import CONTROL_TOKEN, GGUF

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def check(gguf: GGUF) -> None:
    """Raises InvalidArgumentError for any tokenizer other than SmolLM2's."""
    gguf.require("tokenizer.ggml.pre", "smollm")


def model_config(gguf: GGUF) -> dict[str, Any]:
    """Returns the config in the terms of transformers 4.56, which newer releases still read (the reverse fails)."""
    hidden_size = int(gguf.field("llama.embedding_length"))
    num_attention_heads = int(gguf.field("llama.attention.head_count"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": int(gguf.field("llama.feed_forward_length")),
        "num_hidden_layers": gguf.n_layers("llama.block_count"),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": int(gguf.field("llama.attention.head_count_kv")),
        "head_dim": hidden_size // num_attention_heads,
        "max_position_embeddings": int(gguf.field("llama.context_length")),
        "rms_norm_eps": round(float(gguf.field("llama.attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(gguf.field("llama.rope.freq_base")),
        "vocab_size": len(gguf.field("tokenizer.ggml.tokens")),
        "tie_word_embeddings": not gguf.has_tensor("output.weight"),
        **gguf.special_ids(),
    }


def state_dict(gguf: GGUF) -> dict[str, torch.Tensor]:
    """Returns the weights, fp32, by their names in transformers."""
    heads = {stem: int(gguf.field(f"llama.attention.{name}")) for stem, name in _HEADS.items()}
    state = {}
    for name, weight in gguf.weights():
        if name.startswith("blk."):
            _, layer_idx, stem = name.split(".")
            rows = _unpermute(weight, heads[stem]) if stem in heads else weight
            state[f"model.layers.{layer_idx}.{_LAYER_NAMES[stem]}.weight"] = torch.from_numpy(rows)
        else:
            state[f"{_MODEL_NAMES[name]}.weight"] = torch.from_numpy(weight)
    return state


def _unpermute(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undoes the row order of GGUF's interleaved RoPE: pairs ``(2i, 2i+1)`` become ``(i, i + head_dim/2)``."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def tokenizer(gguf: GGUF) -> Tokenizer:
    """Returns the tokenizer, with its control tokens."""
    tokens = gguf.tokens()
    merges = [tuple(merge.split(" ")) for merge in gguf.field("tokenizer.ggml.merges")]
    made = Tokenizer(BPE(vocab={token: index for index, (token, _) in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in tokens if kind == CONTROL_TOKEN]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return made
