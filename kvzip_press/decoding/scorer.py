"""Scores the pairs that are added while a model generates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import nn

from kvzip_press.cache.padding import visible_columns
from kvzip_press.cache.pair_pool.worth import STAYS, Worth
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.tail import writable
from kvzip_press.errors import CacheMismatchError
from kvzip_press.model.hidden_states import watching_hidden_states

Layers = Mapping[int, RaggedLayer]
"""The ragged layers of a cache by index, all of which have read the same tokens."""

Score = Callable[[int, torch.Tensor], torch.Tensor]
"""``(layer_idx, hidden_states [batch, n, hidden_size]) -> [batch, num_key_value_heads, n]``, fp32."""


Aged = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

MOST_WAITING = 32  # tokens: their hidden states are larger than their pairs, and no part of the cache's bytes


class DecodeScorer(ABC):
    """Scores the pairs after a compressed prompt; the scores are stored in the tails of the cache's layers.

    A scorer may leave tokens pending and score several at once; :meth:`settle` is called before scores are needed. It
    does not decide when to evict: see :class:`kvzip_press.decoding.eviction.DecodeEviction`, which calls these methods,
    for one cache at a time.
    """

    #: Whether what it does in a decode step can be captured in a CUDA graph.
    can_be_captured: ClassVar[bool] = True

    @property
    def holds_queries(self) -> bool:
        """Whether queries lie in the cache's tails until they are looked at."""
        return False

    def adopt(self, layers: Layers, *, stays: bool) -> None:
        """Called when the eviction meets a cache, before anything else is asked about it.

        Args:
            layers: The layers of the cache.
            stays: Whether pairs stay, outside the budget, that the layers hold when they are met first.

        Raises:
            CacheMismatchError: The scorer needs to have seen what is in the cache.
        """
        if not stays and any(layer.packed.scores is None for layer in layers.values()):
            raise CacheMismatchError(
                "expected a cache that this press has compressed, whose pairs carry scores, to evict while the model "
                f"writes, got one without ({len(layers)} compressed layers)"
            )
        for layer in layers.values():  # another scorer may have been here
            layer.tail.unscored, layer.tail.has_scores, layer.tail.window = torch.nan, True, None
        if stays:
            mark_staying(layers)

    def worth(self, layers: Layers) -> Mapping[int, Worth] | None:
        """Returns what pairs are worth at an eviction, by layer; None if that is what they carry."""
        return None

    @abstractmethod
    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, the scorer sees what it needs of every forward of the model."""

    @abstractmethod
    def begin(self, layers: Layers, n_tokens: int) -> None:
        """Called when a forward begins that reads ``n_tokens`` tokens into the cache of these layers."""

    @abstractmethod
    def read(self, layers: Layers, n_tokens: int, padding: torch.Tensor | None) -> None:
        """Called when a forward over several tokens is over: they are in the tails, without scores.

        Args:
            layers: The layers of the cache.
            n_tokens: Number of columns read.
            padding: int64 ``[batch]``, how many of them are padding on the left of each row; None for none.
        """

    @abstractmethod
    def seen(self) -> None:
        """Called when the forward of a decode step is over; a captured graph contains and repeats what it does."""

    @abstractmethod
    def written(self, layers: Layers) -> None:
        """Called when a decode step has written one more token into the tails."""

    @abstractmethod
    def settle(self, layers: Layers) -> None:
        """Scores all pending tokens."""

    @abstractmethod
    def cut_to(self, layers: Layers) -> None:
        """Forgets pending tokens that are no longer in the tails, and those of trial steps."""

    @abstractmethod
    def abandon(self) -> None:
        """Forgets the forward that was running, which may have raised."""


def mark_staying(layers: Layers) -> None:
    """Marks all packed pairs of layers as pairs that stay, unless some already are."""
    for layer in layers.values():
        scores = layer.packed.scores
        if scores is None or not bool((scores == STAYS).any()):
            stays = torch.full_like(layer.packed.positions, STAYS, dtype=torch.float32)
            layer.packed = layer.packed.with_scores(stays)
        if not layer.tail.scored:
            layer.tail.begin_scores(unscored=torch.nan)


class HiddenStateScorer(DecodeScorer):
    """Scores tokens by the hidden states that enter attention, several tokens at a time.

    Args:
        score: Function that scores some tokens of one layer, see :data:`Score`.
        aged: Function ``(scores, ages) -> what pairs are worth``, of tensors of one shape, scores fp32 and ages int64:
            the number of tokens that a row has read since the pair's, 0 for the last one. None if that is their score.
        most_waiting: Most tokens whose hidden states wait to be scored.
    """

    def __init__(self, score: Score, aged: Aged | None = None, *, most_waiting: int = MOST_WAITING) -> None:
        self.score, self.aged, self.most_waiting = score, aged, most_waiting
        self._reading = 0  # tokens of the running forward
        self._block: dict[int, torch.Tensor] = {}  # scores of a forward of several tokens
        self._states: dict[int, torch.Tensor] = {}  # [batch, 1, hidden_size] of the token that is read
        self._hidden: torch.Tensor | None = None  # [layers, batch, most_waiting, hidden_size] of tokens without a score
        self._slot: torch.Tensor | None = None  # int64 [1], where the next one goes, on the device
        self._n_rearranged = 0  # of the layers, when the first of these tokens was written
        self._first, self._n_pending = 0, 0  # the column of the first of them in the tail, and how many there are

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While open, the scorer sees the hidden states of every forward of the model."""
        with watching_hidden_states(model, self._look):
            yield

    def worth(self, layers: Layers) -> Mapping[int, Worth] | None:
        """Returns what scores are worth at the age of their pairs; pairs go on carrying the scores."""
        if self.aged is None:
            return None
        return {layer_idx: _at_their_age(layer, self.aged) for layer_idx, layer in layers.items()}

    def begin(self, layers: Layers, n_tokens: int) -> None:
        """Begins a forward; scores pending tokens first if it reads several tokens or another number of rows."""
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
        """Puts the scores of the tokens that were read into the tails."""
        for layer_idx, scores in self._block.items():
            token = None
            if padding is not None:  # a row's earlier tokens have moved over its padding, with their scores
                token = visible_columns(padding.to(scores.device), n_tokens).unsqueeze(1)
            layers[layer_idx].tail.put_scores(scores, layers[layer_idx].tail.length - n_tokens, token)
        self.abandon()

    def seen(self) -> None:
        """Puts a token's hidden states of all layers into the buffer, and moves to the next slot, all on the device."""
        states = torch.stack(list(self._states.values()))
        n_layers, batch, _, hidden_size = states.shape
        if self._hidden is None or self._hidden.shape[1] != batch:
            self._hidden = states.new_empty(n_layers, batch, self.most_waiting, hidden_size)
        if self._slot is None:
            self._slot = torch.full((1,), self._n_pending, device=states.device)
        self._hidden, self._slot = writable(self._hidden), writable(self._slot)
        self._hidden.index_copy_(2, self._slot, states)
        self._slot.add_(1)
        self.abandon()

    def written(self, layers: Layers) -> None:
        """Counts the token whose hidden states are in the buffer, and scores the buffer when it is full."""
        if self._n_pending == 0:
            self._first, self._n_rearranged = _length(layers) - 1, _any(layers).n_rearranged
            self._settle_before_copies(layers)
        self._n_pending += 1
        if self._n_pending == self.most_waiting:
            self.settle(layers)

    def settle(self, layers: Layers) -> None:
        """Scores the tokens in the buffer."""
        if self._n_pending and self._rows_are_known(layers):
            assert self._hidden is not None
            for hidden, (layer_idx, layer) in zip(self._hidden, layers.items(), strict=True):
                layer.tail.put_scores(self.score(layer_idx, hidden[:, : self._n_pending]), self._first)
        self._n_pending = 0
        self._settle_slot()
        for layer in layers.values():
            layer.tail.settle = None

    def _settle_before_copies(self, layers: Layers) -> None:
        """Makes tails get the scores of pending tokens before they are copied: a copy could not get them later."""

        @torch.no_grad()
        def settle() -> None:
            self.cut_to(layers)
            self.settle(layers)

        for layer in layers.values():
            layer.tail.settle = settle

    def cut_to(self, layers: Layers) -> None:
        """Forgets hidden states of tokens that are no longer in the tails."""
        self._n_pending = max(min(self._n_pending, _length(layers) - self._first), 0)
        self._settle_slot()

    def abandon(self) -> None:
        """Forgets the forward that was running."""
        self._reading, self._block, self._states = 0, {}, {}

    def _rows_are_known(self, layers: Layers) -> bool:
        """Whether pending hidden states are still those of the tails' rows; if not, these tokens get no score.

        An eviction then refuses them. All rows that came of a single one have its hidden states.
        """
        assert self._hidden is not None
        return self._hidden.shape[1] == 1 or _any(layers).n_rearranged == self._n_rearranged

    def _settle_slot(self) -> None:
        if self._slot is not None:
            self._slot = writable(self._slot).fill_(self._n_pending)


def _at_their_age(layer: RaggedLayer, aged: Aged) -> Worth:
    packed, tail = layer.packed, layer.tail
    assert packed.scores is not None and tail.scores is not None
    rows = torch.arange(packed.num_rows, device=packed.device)
    rows = rows.repeat_interleave(packed.seqlens.sum(dim=-1), output_size=packed.positions.numel())
    worth = aged(packed.scores, layer.next_positions[rows] - 1 - packed.positions)
    ages = torch.arange(tail.length - 1, -1, -1, device=packed.device).expand_as(tail.scores)
    of_tail = aged(tail.scores, ages)
    return Worth(worth.where(packed.scores != STAYS, STAYS), of_tail, carried=False)


def _any(layers: Layers) -> RaggedLayer:
    return next(iter(layers.values()))


def _length(layers: Layers) -> int:
    return _any(layers).tail.length
