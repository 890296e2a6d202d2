"""What we need to know of a model, found by what its modules offer rather than by their class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import UnsupportedModelError


@dataclass(frozen=True)
class AttentionLayer:
    """One decoder layer's softmax attention.

    Attributes:
        layer_idx: Its index in the cache.
        module: The attention module, whose config names the attention implementation.
        sliding_window: Tokens that it can see, or None when it sees all (only such layers are compressed).
    """

    layer_idx: int
    module: nn.Module
    sliding_window: int | None

    @property
    def is_full(self) -> bool:
        """Whether the layer attends to the whole context."""
        return self.sliding_window is None


def text_decoder(model: nn.Module) -> nn.Module:
    """The module whose ``layers`` are decoder layers with ``self_attn.layer_idx``: no head, no vision tower.

    Raises:
        UnsupportedModelError: The model has no such module.
    """
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and any(_attention_of(layer) is not None for layer in layers):
            return module
    raise UnsupportedModelError(
        f"expected a decoder model whose layers have a `self_attn` with a `layer_idx`, got {type(model).__name__}"
    )


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """All softmax-attention layers of the text decoder, in order (linear-attention layers are not among them)."""
    layers: Any = text_decoder(model).layers
    modules = [_attention_of(layer) for layer in layers]
    return [AttentionLayer(layer_index(m), m, _sliding_window(m)) for m in modules if m is not None]


def layer_index(module: nn.Module) -> int:
    """The index in the cache of the layer that an attention module belongs to."""
    index: Any = module.layer_idx
    return int(index)


def full_attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers that can be compressed.

    Raises:
        UnsupportedModelError: None of the model's layers sees the whole context.
    """
    full = [layer for layer in attention_layers(model) if layer.is_full]
    if not full:
        raise UnsupportedModelError(
            f"expected at least one full-attention layer, but every attention layer of {type(model).__name__} "
            "uses a sliding window, whose cache is already bounded"
        )
    return full


def text_config(model: nn.Module) -> Any:
    """The config that the decoder's attention modules read."""
    return text_decoder(model).config


def layer_fingerprint(module: nn.Module) -> str:
    """A short digest of an attention module's place, shape and a sample of its weights.

    Keys and values only make sense to the weights that made them, so a cache is tied to this, not to the config alone.
    """
    digest = hashlib.sha256(f"{type(module).__name__}:{module.layer_idx}".encode())
    for name, parameter in module.named_parameters():
        sample = parameter.detach().reshape(-1)[:64].to(torch.float32).cpu()
        digest.update(f"{name}:{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _attention_of(layer: nn.Module) -> nn.Module | None:
    module = getattr(layer, "self_attn", None)
    return module if module is not None and hasattr(module, "layer_idx") and hasattr(module, "config") else None


def _sliding_window(module: nn.Module) -> int | None:
    """The window of a sliding layer. A window as long as the model's positions is no window."""
    config: Any = module.config
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer_index(module)] == "full_attention":
        return None
    if window is None or window >= config.max_position_embeddings:
        return None
    return int(window)
