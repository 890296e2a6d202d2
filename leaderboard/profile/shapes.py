"""Models of published shapes with random weights: time and memory do not depend on the weights' values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvzip_press.errors import InvalidArgumentError, did_you_mean

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a published model.

    Attributes:
        model_type: transformers' name of the architecture.
        sizes: Values of its config; the architecture's defaults apply to the rest.
    """

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """Returns a transformers config."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.sizes)


#: Name -> sizes. Qwen3 publishes 40960 positions and stretches them to 131072 (YaRN), which costs no time: the random
#: model gets all 131072, so that every shape can be measured at every length.
SHAPES: dict[str, Shape] = {
    "llama3.1-8b": Shape(
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "rope_theta": 5e5,
            "rope_scaling": _LLAMA3_ROPE,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2.5-0.5b": Shape(
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2.5-7b": Shape(
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen3-8b": Shape(
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
        },
    ),
    "gemma3-12b": Shape(
        "gemma3_text",
        {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 8,
            "vocab_size": 262208,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
        },
    ),
}


def get_shape(name: str) -> Shape:
    """Returns the shape of that name.

    Raises:
        InvalidArgumentError: No such name; the message lists the known ones.
    """
    if name not in SHAPES:
        hint = did_you_mean(name, SHAPES)
        raise InvalidArgumentError(f"expected a shape among {', '.join(SHAPES)}, got {name!r}{hint}")
    return SHAPES[name]


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Any:
    """Makes a causal language model with random weights, in evaluation mode, directly on its device without a copy.

    Args:
        shape: The model's sizes.
        device: Where it is made; the meta device gives shapes alone.
        dtype: Dtype of the weights.
        seed: Seed of the weights.
    """
    from transformers import AutoModelForCausalLM

    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype, attn_implementation="sdpa")
    return model.eval()
