"""Shows hidden states as they enter attention, layer by layer, while a forward runs; none of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press.model.structure import full_attention_layers, layer_index
from kvzip_press.model.watching import before_forward

Look = Callable[[int, torch.Tensor], None]


@contextmanager
def watching_hidden_states(
    model: nn.Module, look: Look, *, is_mine: Callable[[], bool] | None = None
) -> Iterator[None]:
    """While open, this thread's forwards call ``look(layer_idx, hidden_states)`` with what enters full attention.

    Args:
        model: The model.
        look: Called with ``[batch, query_length, hidden_size]``, after the layer's input norm, in the model's dtype. It
            must not change the tensor.
        is_mine: See :func:`kvzip_press.model.watching.before_forward`.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        look(layer_index(module), hidden_states)

    with ExitStack() as stack:
        for layer in full_attention_layers(model):
            stack.enter_context(before_forward(layer.module, before, is_mine=is_mine))
        yield
