"""Gemma 3's GGUF: architecture ``gemma3`` (text only) with a SentencePiece BPE tokenizer.

A GGUF says less than a config: full attention in every sixth layer, the sliding layers' RoPE base and the activation
are part of the architecture (Gemma 3 report, arXiv 2503.19786). The GGUF stores a norm's factor as it is, transformers
stores the factor minus one.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from kvzip_press.loading.gguf import CONTROL_TOKEN, GGUF, USER_DEFINED_TOKEN

_FULL_ATTENTION_EVERY = 6
_LOCAL_ROPE_THETA = 10_000.0
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def check(gguf: GGUF) -> None:
    """Raises InvalidArgumentError if the tokenizer is of another kind."""
    gguf.require("tokenizer.ggml.model", "llama")


def model_config(gguf: GGUF) -> dict[str, Any]:
    """Returns the config in the terms of transformers 4.56, which newer releases still read (the reverse fails)."""
    head_dim, num_layers = int(gguf.field("gemma3.attention.key_length")), gguf.n_layers("gemma3.block_count")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": "float32",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": int(gguf.field("gemma3.embedding_length")),
        "intermediate_size": int(gguf.field("gemma3.feed_forward_length")),
        "num_hidden_layers": num_layers,
        "num_attention_heads": int(gguf.field("gemma3.attention.head_count")),
        "num_key_value_heads": int(gguf.field("gemma3.attention.head_count_kv")),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "max_position_embeddings": int(gguf.field("gemma3.context_length")),
        "rms_norm_eps": round(float(gguf.field("gemma3.attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(gguf.field("gemma3.rope.freq_base")),
        "rope_local_base_freq": _LOCAL_ROPE_THETA,
        "sliding_window": int(gguf.field("gemma3.attention.sliding_window")),
        "layer_types": [
            "sliding_attention" if index % _FULL_ATTENTION_EVERY else "full_attention"
            for index in range(1, num_layers + 1)
        ],
        "vocab_size": len(gguf.field("tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        **gguf.special_ids(),
    }


def state_dict(gguf: GGUF) -> dict[str, torch.Tensor]:
    """Returns the weights, fp32, by their names in transformers."""
    state = {}
    for name, weight in gguf.weights():
        if name.startswith("blk."):
            _, layer_idx, stem = name.split(".")
            target = f"model.layers.{layer_idx}.{_LAYER_NAMES[stem]}"
        else:
            target = _MODEL_NAMES[name]
        state[f"{target}.weight"] = torch.from_numpy(weight - 1 if target.endswith("norm") else weight)
    return state


def tokenizer(gguf: GGUF) -> Tokenizer:
    """Returns SentencePiece's BPE: spaces are letters, unknown letters become bytes, and a text begins with BOS."""
    tokens = gguf.tokens()
    bos_id, unk_id = gguf.special_ids()["bos_token_id"], int(gguf.field("tokenizer.ggml.unknown_token_id"))
    vocab = {token: index for index, (token, _) in enumerate(tokens)}
    made = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(vocab, gguf.field("tokenizer.ggml.scores")),
            unk_token=tokens[unk_id][0],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", _SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = tokens[bos_id][0]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    special = [token for token, kind in tokens if kind == CONTROL_TOKEN]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    # Runs of spaces among them are written with SentencePiece's letter: they are found in the normalised text.
    whole = [token for token, kind in tokens if kind == USER_DEFINED_TOKEN]
    made.add_tokens([AddedToken(token, normalized=True, special=False) for token in whole])
    return made


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns all pairs of pieces whose union is a piece, the best first.

    SentencePiece merges the neighbours that give the piece with the best score.
    """
    pairs = [
        (-scores[index], index, token[:cut], token[cut:])
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]
