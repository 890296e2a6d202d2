"""Lets sliding layers hold no more than their window in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press.model.structure import attention_layers
from kvzip_press.model.watching import after_forward


def own_window(layer: Any) -> None:
    """Copies the tensors of a dense layer that are views of larger ones.

    transformers' sliding layer keeps the last tokens of a forward as a view of all of them, so the memory of a prefill
    stays taken until the next token: in a Gemma 3, five sixths of the whole cache.
    """
    for name in ("keys", "values"):
        tensor = vars(layer).get(name)  # a ragged layer has none
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes:
            setattr(layer, name, tensor.clone())


@contextmanager
def windows_only(model: nn.Module, cache: Any) -> Iterator[None]:
    """While open, each sliding layer of ``cache`` frees what has left its window as soon as its attention is done."""
    with ExitStack() as stack:
        for attention in attention_layers(model):
            if not attention.is_full:
                stack.enter_context(after_forward(attention.module, _after_attention(cache, attention.layer_idx)))
        yield


def _after_attention(cache: Any, layer_idx: int) -> Any:
    return lambda *_: own_window(cache.layers[layer_idx])
