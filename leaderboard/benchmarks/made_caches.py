"""Caches of any size, made of random numbers: how long a step takes does not depend on what was read."""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.compat import DynamicCache
from kvzip_press.model.structure import full_attention_layers, text_config


def ragged_cache(model: Any, n_rows: int, n_tokens: int) -> RaggedCache:
    """Makes a ragged cache whose heads hold all tokens of each row, in no more memory than that.

    Args:
        model: A model whose layers all attend to the whole context.
        n_rows: Batch rows.
        n_tokens: Tokens of each.
    """
    layers = []
    for layer in full_attention_layers(model):
        heads, keys, values = _pairs(model, n_rows, n_tokens)
        positions = torch.arange(n_tokens, dtype=torch.int32, device=model.device).repeat(n_rows * heads)
        bounds = torch.arange(n_rows * heads + 1, dtype=torch.int32, device=model.device) * n_tokens
        columns = {"keys": keys.flatten(0, 2), "values": values.flatten(0, 2), "positions": positions}
        layers.append(
            made_layer(layer.module, PackedPairs(columns, bounds, heads, ModelDtype.of(keys, values)), n_tokens)
        )
    return RaggedCache(layers)


def made_layer(module: Any, packed: PackedPairs, n_tokens: int) -> RaggedLayer:
    """Makes the layer of contexts of ``n_tokens`` tokens each, of which these pairs were kept and none protected."""
    nothing = (0,) * packed.num_rows
    ends = (n_tokens,) * packed.num_rows
    return RaggedLayer(
        packed, n_context=n_tokens, n_protected=nothing, n_padding=nothing, context_ends=ends, module=module
    )


def dynamic_cache(model: Any, n_rows: int, n_tokens: int) -> Any:
    """Makes transformers' own cache of the same size."""
    cache = DynamicCache(config=text_config(model))
    for layer in full_attention_layers(model):
        _, keys, values = _pairs(model, n_rows, n_tokens)
        cache.update(keys, values, layer.layer_idx)
    return cache


def bytes_of_a_token(model: Any) -> int:
    """Returns the bytes of keys and values that a token of one row takes in all layers."""
    _, keys, values = _pairs(model, 1, 1)
    return (keys.nbytes + values.nbytes) * len(full_attention_layers(model))


def _pairs(model: Any, n_rows: int, n_tokens: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    config: Any = text_config(model)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (n_rows, config.num_key_value_heads, n_tokens, dim)
    keys, values = (torch.empty(shape, dtype=model.dtype, device=model.device).normal_() for _ in range(2))
    return shape[1], keys, values
