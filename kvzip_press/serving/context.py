"""What a pool holds: a context's pairs, and the shape that all contexts of one model have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kvzip_press.errors import UnsupportedModelError
from kvzip_press.model.identity import num_kv_heads
from kvzip_press.model.structure import attention_layers, full_attention_layers, text_config, text_decoder
from kvzip_press.serving.arena import ArenaRows, check_pool_storage, row_bytes


@dataclass(frozen=True)
class PoolShape:
    """What all contexts of a pool have in common: the shape of a model's cache.

    Attributes:
        num_layers: Number of decoder layers.
        num_key_value_heads: KV heads of each.
        head_dim: Width of a key and of a value.
        dtype: Dtype of both, and of the model.
        storage: How a pool holds them: "model", in that dtype, or "int8", as files of contexts with that storage do.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: torch.dtype
    storage: str = "model"

    @classmethod
    def of(cls, model: nn.Module, storage: str = "model") -> PoolShape:
        """Returns the shape for a model.

        Raises:
            InvalidArgumentError: Pools hold nothing in this storage.
            UnsupportedModelError: Some layers do not attend to the whole context, or cannot be compressed at all.
        """
        check_pool_storage(storage)
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
        return cls(len(full), num_kv_heads(model), width, dtype, storage)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a key and a value."""
        return 2 * row_bytes(self.head_dim, self.dtype, self.storage)

    @property
    def has_turned_keys(self) -> bool:
        """Whether keys are turned when they come into the pool; codes keep the positions at which they were read."""
        return self.storage == "model"


@dataclass(frozen=True)
class PackedContext:
    """A context as a pool holds it.

    Attributes:
        keys: ``[pairs, head_dim]``, ordered by (layer, KV head, position). Those in the model's dtype are turned so
            that a request's own tokens begin at position 0; codes stand where they were read.
        values: ``[pairs, head_dim]``.
        lengths: int32 ``[num_layers, num_key_value_heads]``, on the CPU: how many pairs each head has.
        n_tokens: Number of tokens that were read to make it.
        n_turns: Number of kept turns (questions with their answers) in it.
        n_places: Pairs for which it takes room, at least as many as it has; None: as many. The processes of an engine
            that share the heads of a context take equal room, so that their pools do the same.
    """

    keys: ArenaRows
    values: ArenaRows
    lengths: torch.Tensor
    n_tokens: int
    n_turns: int = 0
    n_places: int | None = None

    @property
    def room(self) -> int:
        """Pairs for which it takes room."""
        return self.keys.shape[0] if self.n_places is None else self.n_places
