"""Shows hidden states as they enter attention, layer by layer, while a forward runs; none of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press.model.structure import full_attention_layers, layer_index

Look = Callable[[int, torch.Tensor], None]


@contextmanager
def watching_hidden_states(model: nn.Module, look: Look) -> Iterator[None]:
    """While open, every forward calls ``look(layer_idx, hidden_states)`` with what enters each full-attention layer.

    Args:
        model: The model.
        look: Called with ``[batch, query_length, hidden_size]``, after the layer's input norm, in the model's dtype. It
            must not change the tensor.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        look(layer_index(module), hidden_states)

    layers = full_attention_layers(model)
    handles = [layer.module.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
