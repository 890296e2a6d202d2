"""Keeps the queries of the last tokens of a prefill, and computes the attention that these tokens pay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press.attention.implementation import softcap_of
from kvzip_press.attention.queries import queries_watched
from kvzip_press.cache.padding import first_tokens
from kvzip_press.cache.query_window import QueryWindow
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import AttentionLayer
from kvzip_press.model.watching import OpenFor, Watcher


@dataclass(frozen=True)
class Reading:
    """What a prefill forward reads.

    Attributes:
        valid: ``[batch, n]``, bool, False at padding.
        start: Number of tokens that the cache had seen before.
        input_ids: ``[batch, n]``, the tokens; None if only embeddings were given.
    """

    valid: torch.Tensor
    start: int
    input_ids: torch.Tensor | None = None

    def without_first(self, n: int) -> torch.Tensor:
        """Returns a mask of all tokens but the first ``n`` of each row; of a later turn, of all tokens."""
        return self.valid & ~first_tokens(self.valid, 0 if self.start else n)


READING: OpenFor[Reading] = OpenFor("kvzip_press_reading")
_LOGITS_AT_ONCE = 2**25  # numbers in fp32, 128 MB


def being_read(model: nn.Module) -> Reading:
    """Returns what the prefill forward reads that runs, for its observers.

    Raises:
        InvalidArgumentError: No prefill of this package runs in this thread.
    """
    reading = READING.of(model)
    if reading is None:
        raise InvalidArgumentError(
            "expected an observer to watch a prefill of kvzip_press (`prefill`, `compress`, `with press(model):`), got "
            "one that was opened by itself"
        )
    return reading


def token_bounds(valid: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the first column of each row's tokens and the one after its last; padding is at the ends of a row."""
    first = valid.long().argmax(dim=-1)
    return list(zip(first.tolist(), (first + valid.sum(dim=-1)).tolist(), strict=True))


@dataclass(frozen=True)
class _Seen:
    """The queries of one layer's window, and how they attend."""

    window: QueryWindow
    scaling: float | None
    softcap: float | None


class LastQueries(Watcher):
    """Watches one prefill forward, and keeps the queries of the last tokens of each row, layer by layer.

    Args:
        model: The model to watch.
        valid: ``[batch, n]``, bool, False at padding, which may be at both ends of a row.
        window_size: Number of last tokens; of a shorter row there are fewer.

    Attributes:
        bounds: The first column of each row's tokens, and the one after its last.
        lengths: Number of tokens in the window of each row.
    """

    def __init__(self, model: nn.Module, valid: torch.Tensor, window_size: int) -> None:
        self._model, self._valid, self._size = model, valid, window_size
        self.bounds = token_bounds(valid)
        self.lengths = tuple(min(end - first, window_size) for first, end in self.bounds)
        self._seen: dict[int, _Seen] = {}

    def _watch(self, stack: ExitStack) -> None:
        stack.enter_context(queries_watched(self._model, self._look))

    @torch.no_grad()
    def _look(self, layer: AttentionLayer, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
        if query.shape[2] != self._valid.shape[1]:
            return
        window = QueryWindow.last_of(query, self._valid, self._size)
        self._seen[layer.layer_idx] = _Seen(window, kwargs.get("scaling"), softcap_of(layer.module, kwargs))

    def attention(self, layer_idx: int, keys: torch.Tensor) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Yields what the tokens of each row's window pay to the pairs of the span that was read, some heads at a time.

        It is the model's own attention (its scaling and softcap), normalised over the pairs of the span that a token
        sees: itself and those before it. What lies before the span, as in a later turn or chunk, is left out.

        Args:
            layer_idx: The layer.
            keys: ``[batch, num_key_value_heads, n, head_dim]``, its keys of the span: ``prefill.pairs(layer_idx)[0]``.

        Yields:
            The row; a slice of its KV heads; ``[heads, num_key_value_groups, window, n]``, fp32, over the ``n`` tokens
            of the row without its padding.
        """
        seen, num_heads = self._seen[layer_idx], keys.shape[1]
        last = seen.window.queries
        for row, (first_token, end) in enumerate(self.bounds):
            own, size = keys[row, :, first_token:end], self.lengths[row]
            queries = last[row, :, last.shape[2] - size :].unflatten(0, (num_heads, -1))
            at_once = max(_LOGITS_AT_ONCE // (queries.shape[1] * size * own.shape[1]), 1)
            for first in range(0, num_heads, at_once):
                heads = slice(first, min(first + at_once, num_heads))
                yield row, heads, _attention(queries[heads], own[heads], seen.scaling, seen.softcap)


def _attention(queries: torch.Tensor, keys: torch.Tensor, scaling: float | None, softcap: float | None) -> torch.Tensor:
    """Returns causal attention of the last tokens, fp32: ``[heads, groups, window, d]`` and ``[heads, n, d]``."""
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    logits = queries.float() @ keys.float().transpose(-1, -2).unsqueeze(1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    window, n = logits.shape[-2:]
    ahead = torch.ones(window, n, dtype=torch.bool, device=logits.device).triu(n - window + 1)
    return logits.masked_fill(ahead, -torch.inf).softmax(dim=-1)
