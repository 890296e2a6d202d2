"""Shows hidden states as they enter attention, layer by layer, while a forward runs; they themselves are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press.model.structure import full_attention_layers, layer_index
from kvzip_press.model.watching import Watcher, before_forward

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


class FromHiddenStates(Watcher):
    """Holds what a function makes of the hidden states of each layer, while it is open, when attention begins.

    Args:
        model: The model to watch.
        make: Called with a layer's index and its hidden states ``[batch, query_length, hidden_size]``.

    Attributes:
        layers: ``layer_idx ->`` what was made, of the layers that have run.
    """

    def __init__(self, model: nn.Module, make: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        self.layers: dict[int, torch.Tensor] = {}
        self._model, self._make = model, make

    def _watch(self, stack: ExitStack) -> None:
        stack.enter_context(watching_hidden_states(self._model, self._look))

    def _look(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        self.layers[layer_idx] = self._make(layer_idx, hidden_states)
