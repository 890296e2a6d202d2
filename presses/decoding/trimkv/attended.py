"""What gates of TrimKV learn from: which pairs a full cache would still look at, at some moments of a text.

The paper trains gates through the model, with its loss as it forgets. Here forward passes are enough: at a moment t, a
pair is worth keeping if it is among the ``memory_size`` pairs of its head to which a query after t pays most attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press.attention.implementation import attach, attention_watched, softcap_of
from kvzip_press.model.devices import input_device
from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.model.structure import AttentionLayer
from kvzip_press.prefilling.whole import run_prefill

_QUERIES = 256  # whose attention is in memory at a time


@dataclass(frozen=True)
class Lesson:
    """One layer's part of a text.

    Attributes:
        hidden_states: ``[n, hidden_size]``, as they enter attention, in the model's dtype.
        moments: int64 ``[m]``: how many tokens had been read.
        kept: bool ``[num_key_value_heads, m, n]``: which pairs were worth keeping then; False at those to come.
    """

    hidden_states: torch.Tensor
    moments: torch.Tensor
    kept: torch.Tensor


@torch.no_grad()
def lessons(model: nn.Module, ids: list[int], moments: list[int], memory_size: int) -> dict[int, Lesson]:
    """Reads a text once from an empty cache.

    Args:
        model: A causal language model.
        ids: The text's tokens.
        moments: How many tokens had been read, ascending, each fewer than the text has.
        memory_size: Pairs of a head that are worth keeping.

    Returns:
        What each full-attention layer can learn, by index.
    """
    attach(model)
    watch = _Watch(model, torch.tensor(moments), memory_size)
    input_ids = torch.tensor([ids], device=input_device(model))
    with watch.opened():
        run_prefill(model, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
    return watch.lessons


class _Watch:
    def __init__(self, model: nn.Module, moments: torch.Tensor, memory_size: int) -> None:
        self.lessons: dict[int, Lesson] = {}
        self._model, self._moments, self._memory_size = model, moments, memory_size
        self._states: dict[int, torch.Tensor] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, looks at what enters attention and at what it pays."""
        with ExitStack() as stack:
            stack.enter_context(watching_hidden_states(self._model, self._enter))
            stack.enter_context(attention_watched(self._model, self._look))
            yield

    def _enter(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        self._states[layer_idx] = hidden_states[0]

    def _look(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        moments = self._moments.to(query.device)
        paid = attention_after(query[0], keys[0], moments, scaling, softcap_of(layer.module, kwargs))
        states = self._states.pop(layer.layer_idx)
        self.lessons[layer.layer_idx] = Lesson(states, moments, worth_keeping(paid, self._memory_size))


def attention_after(
    query: torch.Tensor, keys: torch.Tensor, moments: torch.Tensor, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """Returns the most attention that a query behind each moment pays to each pair before it.

    Args:
        query: ``[num_attention_heads, n, head_dim]``, after RoPE.
        keys: ``[num_key_value_heads, n, head_dim]``, after RoPE.
        moments: int64 ``[m]``, ascending.
        scaling: Factor of the logits.
        softcap: Bound of the logits; None for none.

    Returns:
        fp32 ``[num_key_value_heads, m, n]``, the maximum over the query heads of a group; -1 at pairs to come.
    """
    heads, n, _ = keys.shape
    grouped, transposed = query.unflatten(0, (heads, -1)), keys.float().transpose(1, 2).unsqueeze(1)
    columns = torch.arange(n, device=query.device)
    most = torch.zeros(heads, len(moments), n, device=query.device)
    for first in range(int(moments[0]), n, _QUERIES):
        rows = columns[first : first + _QUERIES]
        logits = scaling * (grouped[:, :, rows].float() @ transposed)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        attention = logits.masked_fill(columns > rows[:, None], -torch.inf).softmax(dim=-1).amax(dim=1)
        for number, moment in enumerate(moments.tolist()):
            behind = attention[:, rows >= moment]
            if behind.shape[1]:
                most[:, number] = torch.maximum(most[:, number], behind.amax(dim=1))
    return most.masked_fill(columns >= moments[:, None], -1.0)


def worth_keeping(paid: torch.Tensor, memory_size: int) -> torch.Tensor:
    """Returns which pairs are among the ``memory_size`` of their head that get most, bool; of fewer, all."""
    best = paid.topk(min(memory_size, paid.shape[-1]), dim=-1)
    return torch.zeros_like(paid, dtype=torch.bool).scatter(-1, best.indices, best.values >= 0)
