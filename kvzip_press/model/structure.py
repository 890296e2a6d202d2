"""Finds what is needed of a model, by what its modules offer rather than by their class."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError

_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OWNERS: WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], bool]] = WeakKeyDictionary()  # of attention
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class AttentionLayer:
    """The softmax attention of one decoder layer.

    Attributes:
        layer_idx: Its index in the cache.
        module: The attention module, whose config names the attention implementation.
        sliding_window: Number of tokens that it can see; None if it sees all (only such layers are compressed).
        shares_with: Index of the layer whose keys and values it reads, inside ``share_layers``; None if it has its own.
    """

    layer_idx: int
    module: nn.Module
    sliding_window: int | None
    shares_with: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether the layer attends to the whole context."""
        return self.sliding_window is None


def text_decoder(model: nn.Module) -> nn.Module:
    """Returns the module whose ``layers`` are decoder layers with ``self_attn.layer_idx``: no head, no vision tower.

    Raises:
        UnsupportedModelError: The model has no such module.
    """
    for module in model.modules():
        layers = getattr(module, "layers", None)
        has_attention = isinstance(layers, nn.ModuleList) and any(_attention_of(layer) is not None for layer in layers)
        if has_attention and hasattr(module, "config"):
            return module
    raise UnsupportedModelError(
        f"expected a decoder model whose layers have a `self_attn` with a `layer_idx`, got {type(model).__name__}"
    )


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Returns all softmax-attention layers of the text decoder, in order (linear-attention layers are left out)."""
    decoder: Any = text_decoder(model)
    modules = [_attention_of(layer) for layer in decoder.layers]
    layers = [AttentionLayer(layer_index(m), m, _sliding_window(m), _shares_with(m)) for m in modules if m is not None]
    first = next((layer.module for layer in layers if layer.is_full), None)
    for layer in layers:
        _OWNERS[layer.module] = (weakref.ref(decoder), layer.module is first)
    return layers


def decoder_of(module: nn.Module) -> nn.Module | None:
    """Returns the decoder that an attention module is a part of; None if no model with it has been looked at."""
    decoder, _ = _OWNERS.get(module, (lambda: None, False))
    return decoder()


def is_first_full(module: nn.Module) -> bool:
    """Returns whether an attention module is the first of its decoder that sees the whole context."""
    return _OWNERS.get(module, (None, False))[1]


def layer_index(module: nn.Module) -> int:
    """Returns the index in the cache of the layer that an attention module belongs to."""
    index: Any = module.layer_idx
    return int(index)


def full_attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Returns the layers that can be compressed, in order: those that attend to the whole context.

    Layers that read the keys and values of others (``share_layers``) have nothing to compress, and are left out.

    Raises:
        UnsupportedModelError: No layer of the model sees the whole context; or some keep a state instead of keys and
            values (linear attention, convolution, state spaces). Such a state is written in place: a replay or a
            question would change it for everything that comes after. Or the model is an encoder-decoder, layers share
            the keys and values of others, or adapters put virtual tokens before those of the context.
    """
    decoder = text_decoder(model)
    _refuse_other_reading(model, decoder)
    kinds = [_kind(layer, index, decoder.config) for index, layer in enumerate(decoder.layers)]  # type: ignore[arg-type]
    if others := sorted(set(kinds) - _KINDS):
        raise UnsupportedModelError(
            f"expected attention to keys and values in every layer, got {type(model).__name__} with {', '.join(others)}"
        )
    full = [layer for layer in attention_layers(model) if layer.is_full and layer.shares_with is None]
    if not full:
        raise UnsupportedModelError(
            f"expected at least one full-attention layer, but every attention layer of {type(model).__name__} "
            "uses a sliding window, whose cache is already bounded"
        )
    return full


def _refuse_other_reading(model: nn.Module, decoder: Any) -> None:
    """Raises UnsupportedModelError for a model whose keys and values are not one pair a token and layer."""
    name = type(model).__name__
    if getattr(decoder.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"expected a decoder-only model, got the encoder-decoder {name}")
    learned = getattr(model, "active_peft_config", None)
    if getattr(learned, "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"expected a model that reads the tokens it is given, got {name} with {type(learned).__name__}, which puts "
            "virtual tokens before them: use the base model, or adapters that change weights (LoRA)"
        )
    modules = [module for layer in decoder.layers if (module := _attention_of(layer)) is not None]
    shared = [layer_index(module) for module in modules if getattr(module, "is_kv_shared_layer", False)]
    if shared:
        raise UnsupportedModelError(
            f"expected keys and values of its own in every layer, got {name}, whose layers {shared} use those of others"
        )


def check_keeps_cache(decoder: nn.Module) -> None:
    """Raises UnsupportedModelError if a decoder is set to forget keys and values: it trains with checkpoints.

    transformers then reads without a cache, whatever it is asked.
    """
    forgets = (getattr(part, "gradient_checkpointing", False) and part.training for part in decoder.modules())
    if any(forgets):
        raise UnsupportedModelError(
            f"expected a model that fills its cache, got {type(decoder).__name__} in training mode with gradient "
            "checkpointing, which drops it: call model.eval() or model.gradient_checkpointing_disable()"
        )


_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def output_projection(module: nn.Module) -> nn.Module:
    """Returns the linear layer that an attention module ends with, whatever it is called.

    Raises:
        UnsupportedModelError: There is none of a known name.
    """
    for name in _OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module) and hasattr(projection, "in_features"):
            return projection
    parts = ", ".join(name for name, _ in module.named_children())
    raise UnsupportedModelError(
        f"expected an attention module with an output projection, one of {', '.join(_OUTPUT_PROJECTIONS)}, got "
        f"{type(module).__name__} with {parts or 'no parts'}"
    )


def text_config(model: nn.Module) -> Any:
    """Returns the config that the decoder's attention modules read."""
    return text_decoder(model).config


def dense_weight(linear: Any, like: torch.Tensor) -> torch.Tensor:
    """Returns the matrix that a linear layer multiplies by, fp32 ``[out_features, in_features]``, however it is stored.

    For quantized, adapted (LoRA) and offloaded layers it is made of their outputs for the unit vectors.

    Args:
        linear: The layer.
        like: Any tensor of the dtype and device of its inputs.
    """
    if type(linear) is nn.Linear and linear.weight.dtype in _PLAIN and not linear.weight.is_meta:
        return linear.weight.float()
    unit = torch.eye(linear.in_features, dtype=like.dtype, device=like.device)
    # Not from zero: a layer in fp8 scales its inputs block by block, and divides 0 by 0 where a block is all zeros.
    little = torch.full_like(unit[:1], 2.0**-14)
    columns: torch.Tensor = linear(unit + little) - linear(little)  # without the bias
    return columns.float().T


def _attention_of(layer: nn.Module) -> nn.Module | None:
    module = getattr(layer, "self_attn", None)
    has_place = getattr(module, "layer_idx", None) is not None and hasattr(module, "config")
    return module if has_place else None


def _kind(layer: nn.Module, index: int, config: Any) -> str:
    """Returns what a decoder layer attends with, in the terms of a config's ``layer_types``."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return str(layer_types[index])
    if hasattr(layer, "mamba"):
        return "mamba beside attention"  # Falcon H1 has both in every layer
    return type(layer).__name__ if _attention_of(layer) is None else "full_attention"


def _sliding_window(module: nn.Module) -> int | None:
    """Returns the window of a sliding layer, else None. A window as long as the model's positions is none."""
    config: Any = module.config
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer_index(module)] == "full_attention":
        return None
    if window is None or window >= config.max_position_embeddings:
        return None
    return int(window)


def _shares_with(module: nn.Module) -> int | None:
    """Returns the index of the layer whose keys and values a layer reads: its projection to keys says so."""
    index: int | None = getattr(getattr(module, "k_proj", None), "shares_with", None)
    return index


def max_positions(model: nn.Module) -> int | None:
    """Returns how many positions a model was made for; None if its config names no limit."""
    limit: int | None = getattr(text_config(model), "max_position_embeddings", None)
    return limit


def check_length(model: nn.Module, length: int) -> None:
    """Raises InvalidArgumentError if a context is longer than the model's positions."""
    limit = max_positions(model)
    if limit is not None and length > limit:
        raise InvalidArgumentError(f"expected a context within the model's {limit} positions, got {length} tokens")
