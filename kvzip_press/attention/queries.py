"""Shows the queries of each attention call of an attached model, over dense layers and ragged ones alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

#: Called with an attention module, its queries ``[batch, num_attention_heads, query_length, head_dim]`` after RoPE, and
#: the further arguments of the attention interface (``scaling``, ``softcap``). It must not change the tensor.
Look = Callable[[nn.Module, torch.Tensor, dict[str, Any]], None]

_LOOKS: ContextVar[tuple[Look, ...]] = ContextVar("kvzip_press_query_looks", default=())


@contextmanager
def queries_watched(look: Look) -> Iterator[None]:
    """While open, ``look`` is called before each attention call of this thread; several may look at once."""
    _LOOKS.set((*_LOOKS.get(), look))
    try:
        yield
    finally:
        _LOOKS.set(tuple(one for one in _LOOKS.get() if one is not look))


def show_query(module: nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Shows one call to all who look."""
    for look in _LOOKS.get():
        look(module, query, kwargs)
