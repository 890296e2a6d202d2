"""Shows the queries of each attention call of an attached model, over dense layers and ragged ones alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from kvzip_press.model.structure import AttentionLayer, full_attention_layers

#: Called with a layer, its queries ``[batch, num_attention_heads, query_length, head_dim]`` after RoPE, and the further
#: arguments of the attention interface (``scaling``, ``softcap``). It must not change the tensor.
Look = Callable[[AttentionLayer, torch.Tensor, dict[str, Any]], None]

_LOOKS: ContextVar[tuple[Callable[..., None], ...]] = ContextVar("kvzip_press_query_looks", default=())


def of_layers(model: nn.Module, look: Callable[..., None]) -> Callable[..., None]:
    """Returns what calls ``look(layer, ...)`` when it is called with the attention module of a layer of a model.

    Only layers that can be compressed are shown (:func:`kvzip_press.model.structure.full_attention_layers`); calls of
    other layers and of other models are ignored.
    """
    layers = {layer.module: layer for layer in full_attention_layers(model)}

    def of_module(module: nn.Module, *call: Any) -> None:
        if (layer := layers.get(module)) is not None:
            look(layer, *call)

    return of_module


@contextmanager
def queries_watched(model: nn.Module, look: Look) -> Iterator[None]:
    """While open, ``look`` is called before each attention call of a model in this thread; several may look at once."""
    shown = of_layers(model, look)
    _LOOKS.set((*_LOOKS.get(), shown))
    try:
        yield
    finally:
        _LOOKS.set(tuple(one for one in _LOOKS.get() if one is not shown))


def show_query(module: nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Shows one call to all who look."""
    for shown in _LOOKS.get():
        shown(module, query, kwargs)
