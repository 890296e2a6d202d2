"""How surprising each token of a context was to the model that read it, from the prefill's own hidden states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.model.structure import text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.model.watching import Watcher, after_forward
from kvzip_press.prefilling.query_window import being_read, token_bounds

if TYPE_CHECKING:
    from torch import nn

LOGITS_AT_ONCE = 2**25  # numbers: 64 MB as the model makes them, 128 MB in fp32


class Surprisals(Watcher):
    """Watches one prefill forward, and computes the surprisal of its tokens when the last layer is done.

    The hidden states that the decoder returns go through the model's own head, some tokens at a time: there is no
    second forward, and never a tensor of all tokens by the vocabulary. It costs the head's FLOPs for each token, which
    a prefill saves; beside a forward they are few in a large model and many in a small one with a large vocabulary.

    Args:
        model: The model to watch.

    Raises:
        UnsupportedModelError: The model has no head.
    """

    def __init__(self, model: nn.Module) -> None:
        if text_decoder(model) is model:
            raise UnsupportedModelError(
                f"expected a causal language model, whose head says how probable a token is, got {type(model).__name__}"
            )
        self._model = model
        self._values: torch.Tensor | None = None

    def _watch(self, stack: ExitStack) -> None:
        stack.enter_context(after_forward(text_decoder(self._model), self._look, first=True))

    @property
    def values(self) -> torch.Tensor:
        """``-log p`` of each token after those before it, in nats, fp32 ``[batch, n]``.

        It is infinite where nothing was there to predict a token from: for the first of a row, of a later turn and of a
        chunk, whose predecessors are in another forward. At padding it is 0.

        Raises:
            InvalidArgumentError: No token ids were read.
        """
        if self._values is None:
            raise InvalidArgumentError("expected input_ids, whose probabilities can be asked for, got none")
        return self._values

    @torch.no_grad()
    def _look(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        reading = being_read(self._model)
        if reading.input_ids is None:
            return
        hidden_states = output[0]
        ids, head = reading.input_ids.to(hidden_states.device), head_of(self._model)
        self._values = hidden_states.new_zeros(ids.shape, dtype=torch.float32)
        for row, (first, end) in enumerate(token_bounds(reading.valid)):
            self._values[row, first] = torch.inf
            self._values[row, first + 1 : end] = _surprisals(head, hidden_states[row, first:end], ids[row, first:end])


def _surprisals(head: Head, hidden_states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns ``-log p`` of all tokens of a row but the first, fp32 ``[n - 1]``, given ``[n, hidden_size]``."""
    parts = []
    start, at_once, end = 0, 1, ids.shape[0] - 1  # the first slice says how large the vocabulary is
    while start < end:
        stop = min(start + at_once, end)
        logits = head(hidden_states[None, start:stop], ids[None, start:stop])[0]
        log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
        parts.append(-log_p.gather(-1, ids[start + 1 : stop + 1, None].to(log_p.device))[:, 0].to(ids.device))
        start, at_once = stop, max(LOGITS_AT_ONCE // logits.shape[-1], 1)
    return torch.cat(parts) if parts else hidden_states.new_zeros(0, dtype=torch.float32)


Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def head_of(model: nn.Module) -> Head:
    """Returns what makes logits of hidden states and their ids, with all that the model does to them (scale, softcap).

    It is the model's own forward in a twin whose decoder returns what it is told. The twin has no hooks: those that are
    open are about the forward that runs.
    """
    twin = twin_of(model, only=[text_decoder(model)])
    decoder = text_decoder(twin)
    for module in twin.modules():
        if decoder in module.modules():  # a copy: all others are the model's own
            module._forward_hooks.clear()  # noqa: SLF001  # no public name
            module._forward_pre_hooks.clear()  # noqa: SLF001
    states: list[Any] = []
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=states.pop())

    def head(hidden_states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        states.append(hidden_states)
        logits: torch.Tensor = twin(input_ids=ids, use_cache=False, return_dict=True).logits
        return logits

    return head
