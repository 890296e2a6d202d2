"""Turn a Llama-family GGUF file into the files that ``from_pretrained`` reads.

transformers can load a GGUF itself, but it then asks for ``accelerate``, builds another tokenizer in every release (in
some with a wrong end-of-turn token and a wrong byte decoder) and saves files that other releases misread. Here the
weights are dequantised with the package ``gguf``, bit for bit what transformers computes, and every file is written in
the plain form that transformers 4.56 and all later releases agree on.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
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
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(gguf_path: Path, output_dir: Path) -> None:
    """Write ``model.safetensors`` (fp32), both configs and the tokenizer of a GGUF into a directory.

    Args:
        gguf_path: A GGUF of architecture ``llama`` whose tokenizer is byte-level BPE with digits split ("smollm").
        output_dir: An existing directory; files of the same names are overwritten.

    Raises:
        MissingDependencyError: The package ``gguf`` is not installed.
        InvalidArgumentError: Another architecture or tokenizer than those above.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependencyError("reading a GGUF file needs the package gguf: pip install gguf") from error
    reader = GGUFReader(str(gguf_path))
    _require(reader, "general.architecture", "llama")
    _require(reader, "tokenizer.ggml.pre", "smollm")
    config = _model_config(reader)
    save_file(_state_dict(reader, config), output_dir / "model.safetensors", metadata={"format": "pt"})
    _build_tokenizer(reader).save(str(output_dir / "tokenizer.json"))
    _write_json(output_dir / "config.json", config)
    _write_json(output_dir / "generation_config.json", {key: config[key] for key in _special_ids(reader)})
    _write_json(output_dir / "tokenizer_config.json", _tokenizer_config(reader))


def _field(reader: "GGUFReader", name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise InvalidArgumentError(f"the GGUF has no field {name!r}")
    return field.contents()


def _require(reader: "GGUFReader", name: str, expected: str) -> None:
    if (value := _field(reader, name)) != expected:
        raise InvalidArgumentError(f"expected a GGUF with {name} = {expected!r}, got {value!r}")


def _special_ids(reader: "GGUFReader") -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: int(_field(reader, f"tokenizer.ggml.{name}_token_id")) for key, name in names.items()}


def _model_config(reader: "GGUFReader") -> dict[str, Any]:
    """The config in the words of transformers 4.56, which newer releases still read (the other way round fails)."""
    hidden_size = int(_field(reader, "llama.embedding_length"))
    num_attention_heads = int(_field(reader, "llama.attention.head_count"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "head_dim": hidden_size // num_attention_heads,
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "rms_norm_eps": round(float(_field(reader, "llama.attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        **_special_ids(reader),
    }


def _state_dict(reader: "GGUFReader", config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if stem.startswith("blk."):
            _, layer_idx, stem = stem.split(".")
            if stem in heads:
                weight = _unpermute(weight, heads[stem])
            state[f"model.layers.{layer_idx}.{_LAYER_NAMES[stem]}.weight"] = torch.from_numpy(weight)
        else:
            state[f"{_MODEL_NAMES[stem]}.weight"] = torch.from_numpy(weight)
    return state


def _unpermute(weight: "np.ndarray[Any, Any]", num_heads: int) -> "np.ndarray[Any, Any]":
    """Undo the row order of GGUF's interleaved RoPE: pairs ``(2i, 2i+1)`` become ``(i, i + head_dim/2)``."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _build_tokenizer(reader: "GGUFReader") -> Tokenizer:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _tokenizer_config(reader: "GGUFReader") -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    named = {key.removesuffix("_id"): tokens[index] for key, index in _special_ids(reader).items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(_field(reader, "llama.context_length")),
        "unk_token": tokens[int(_field(reader, "tokenizer.ggml.unknown_token_id"))],
        **named,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
