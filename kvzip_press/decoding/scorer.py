"""What a press looks at while the model writes, and the scores of the pairs that are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from kvzip_press.cache.padding import visible_columns
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.model.hidden_states import watching_hidden_states

Layers = Mapping[int, RaggedLayer]
"""The ragged layers of a cache by index, all of which have read the same tokens."""

Score = Callable[[int, torch.Tensor], torch.Tensor]
"""``(layer_idx, hidden_states [batch, n, hidden_size]) -> [batch, num_key_value_heads, n]``, fp32."""


class DecodeScorer(ABC):
    """Gives the pairs behind a compressed prompt their scores, which lie in the tails of the cache's layers.

    It may leave tokens pending, and score several at once; :meth:`settle` is called before scores are needed. When to
    evict by the scores is not its business: see :class:`kvzip_press.decoding.eviction.DecodeEviction`, which calls all
    that is here, for one cache at a time.
    """

    @abstractmethod
    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, the scorer sees what it looks at in every forward of the model."""

    @abstractmethod
    def begin(self, layers: Layers, n_tokens: int) -> None:
        """A forward over ``n_tokens`` behind the cache of these layers begins."""

    @abstractmethod
    def read(self, layers: Layers, n_tokens: int, padding: torch.Tensor | None) -> None:
        """A forward over several tokens is over; they are in the tails, without scores.

        Args:
            layers: The cache's.
            n_tokens: Columns read.
            padding: int64 ``[batch]``, how many of them are padding on the left of each row; None without any.
        """

    @abstractmethod
    def seen(self) -> None:
        """The forward of a decode step is over. Inside a captured graph this is what the graph repeats."""

    @abstractmethod
    def written(self, layers: Layers) -> None:
        """A decode step has written one more token into the tails."""

    @abstractmethod
    def settle(self, layers: Layers) -> None:
        """Scores what is pending."""

    @abstractmethod
    def cut_to(self, layers: Layers) -> None:
        """Forgets pending tokens that are not in the tails any more, and what was run on trial."""

    @abstractmethod
    def abandon(self) -> None:
        """Forgets the forward that ran: it may have raised."""


class HiddenStateScorer(DecodeScorer):
    """Scores tokens by the hidden states that enter attention, a buffer of them at once.

    Args:
        score: Scores some tokens of one layer.
        buffer: Tokens whose hidden states wait to be scored, at most.
    """

    def __init__(self, score: Score, buffer: int) -> None:
        self.score, self.buffer = score, buffer
        self._reading = 0  # tokens of the forward that runs
        self._block: dict[int, torch.Tensor] = {}  # scores of a forward of several tokens
        self._states: dict[int, torch.Tensor] = {}  # [batch, 1, hidden_size] of the token that is read
        self._hidden: torch.Tensor | None = None  # [layers, batch, buffer, hidden_size] of tokens without a score
        self._slot: torch.Tensor | None = None  # int64 [1], where the next one goes, on the device
        self._first, self._n_pending = 0, 0  # the column of the first of them in the tail, and how many there are

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While open, the scorer sees the hidden states of every forward of the model."""
        with watching_hidden_states(model, self._look):
            yield

    def begin(self, layers: Layers, n_tokens: int) -> None:
        """A forward begins; one over other rows than those whose tokens are pending, or over a block, finds none so."""
        batch_size = next(iter(layers.values())).batch_size
        if n_tokens > 1 or (self._hidden is not None and self._hidden.shape[1] != batch_size):
            self.settle(layers)
        self._reading, self._block = n_tokens, {}

    def _look(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        if self._reading > 1:
            self._block[layer_idx] = self.score(layer_idx, hidden_states)
        elif self._reading:
            self._states[layer_idx] = hidden_states

    def read(self, layers: Layers, n_tokens: int, padding: torch.Tensor | None) -> None:
        """Hands the scores of the block to the tails."""
        for layer_idx, scores in self._block.items():
            token = None
            if padding is not None:  # over a row's padding its earlier tokens have moved, with their scores
                token = visible_columns(padding.to(scores.device), n_tokens).unsqueeze(1)
            layers[layer_idx].tail.put_scores(scores, layers[layer_idx].tail.length - n_tokens, token)
        self.abandon()

    def seen(self) -> None:
        """Puts the hidden states of a token in the buffer, those of all layers at once, and moves on: on the device."""
        states = torch.stack(list(self._states.values()))
        n_layers, batch, _, hidden_size = states.shape
        if self._hidden is None or self._hidden.shape[1] != batch:
            self._hidden = states.new_empty(n_layers, batch, self.buffer, hidden_size)
        if self._slot is None:
            self._slot = torch.full((1,), self._n_pending, device=states.device)
        self._hidden.index_copy_(2, self._slot, states)
        self._slot.add_(1)
        self.abandon()

    def written(self, layers: Layers) -> None:
        """Counts the token whose hidden states are in the buffer; a full one is scored."""
        if self._n_pending == 0:
            self._first = _length(layers) - 1
        self._n_pending += 1
        if self._n_pending == self.buffer:
            self.settle(layers)

    def settle(self, layers: Layers) -> None:
        """Scores the tokens in the buffer."""
        if self._n_pending:
            assert self._hidden is not None
            for hidden, (layer_idx, layer) in zip(self._hidden, layers.items(), strict=True):
                layer.tail.put_scores(self.score(layer_idx, hidden[:, : self._n_pending]), self._first)
        self._n_pending = 0
        self._settle_slot()

    def cut_to(self, layers: Layers) -> None:
        """Forgets hidden states of tokens that are not in the tails any more."""
        self._n_pending = max(min(self._n_pending, _length(layers) - self._first), 0)
        self._settle_slot()

    def abandon(self) -> None:
        """Forgets the forward that ran."""
        self._reading, self._block, self._states = 0, {}, {}

    def _settle_slot(self) -> None:
        if self._slot is not None:
            self._slot.fill_(self._n_pending)


def _length(layers: Layers) -> int:
    return next(iter(layers.values())).tail.length
