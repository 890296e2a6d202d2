"""What a pool holds: a context's pairs, and the shape that all contexts of one model have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kvzip_press.errors import UnsupportedModelError
from kvzip_press.model.identity import num_kv_heads
from kvzip_press.model.structure import attention_layers, full_attention_layers, text_config, text_decoder


@dataclass(frozen=True)
class PoolShape:
    """What all contexts of a pool have in common: the shape of a model's cache.

    Attributes:
        num_layers: Number of decoder layers.
        num_key_value_heads: KV heads of each.
        head_dim: Width of a key and of a value.
        dtype: Dtype of both.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> PoolShape:
        """Returns the shape for a model.

        Raises:
            UnsupportedModelError: Some layers do not attend to the whole context, or cannot be compressed at all.
        """
        full = full_attention_layers(model)
        others = [layer.layer_idx for layer in attention_layers(model) if not layer.is_full]
        if others:
            raise UnsupportedModelError(
                f"expected attention to the whole context in every layer, got {type(model).__name__} with sliding "
                f"windows in layers {others}: requests share a context, but a window moves with each request's own "
                "tokens. Answer one cache at a time instead, with kvzip_press.answer"
            )
        config = text_config(model)
        width: int = getattr(full[0].module, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype: torch.dtype = text_decoder(model).dtype  # type: ignore[assignment]
        return cls(len(full), num_kv_heads(model), width, dtype)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a key and a value."""
        return 2 * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class PackedContext:
    """A context as a pool holds it.

    Attributes:
        keys: ``[pairs, head_dim]``, ordered by (layer, KV head, position), turned so that a request's own tokens begin
            at position 0.
        values: ``[pairs, head_dim]``.
        lengths: int32 ``[num_layers, num_key_value_heads]``, on the CPU: how many pairs each head has.
        n_tokens: Number of tokens that were read to make it.
        n_turns: Number of kept turns (questions with their answers) in it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    n_tokens: int
    n_turns: int = 0
