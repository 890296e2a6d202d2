"""Eviction while a model writes: the cache stays within a budget however long the answer is.

Hidden states of the tokens read are buffered; once a buffer is full their pairs are scored. When the cache exceeds its
budget by a buffer, the worst pairs of all go (Fast KVzip, https://arxiv.org/abs/2601.17668), and survivors keep the
score they got. Scores stay with the cache's layers; what is here is of the forwards that run, one cache at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvzip_press.cache.padded_block import BlockLayer
from kvzip_press.cache.padding import visible_columns
from kvzip_press.cache.pair_pool import PairPool, give_back_room, held_tokens
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError

Score = Callable[[int, torch.Tensor], torch.Tensor]
"""``(layer_idx, hidden_states [batch, n, hidden_size]) -> [batch, num_key_value_heads, n]``, fp32."""


class DecodeEviction:
    """Keeps caches within a budget while forwards read one token or more.

    A row that comes to hold ``budget + buffer`` tokens' worth of pairs (on average over its heads) is cut to
    ``budget``, whatever the other rows hold; it holds more only while a forward of several tokens runs.

    Args:
        score: Scores the pairs of some tokens.
        budget: Tokens' worth of pairs that stay.
        buffer: Tokens between two evictions; the last so many stay in every head.
        allocation: How pairs compete, see :class:`kvzip_press.cache.pair_pool.PairPool`.
    """

    def __init__(self, score: Score, *, budget: int, buffer: int, allocation: str) -> None:
        self.score, self.budget, self.buffer, self.allocation = score, budget, buffer, allocation
        self.in_static_step = False
        self._reading = 0  # tokens of the forward that runs
        self._layers: dict[int, RaggedLayer] = {}  # of the cache that was read last
        self._padding: torch.Tensor | None = None  # of the block that is read
        self._states: dict[int, torch.Tensor] = {}  # [batch, 1, hidden_size] of the token that is read
        self._hidden: torch.Tensor | None = None  # [layers, batch, buffer, hidden_size] of tokens without a score
        self._slot: torch.Tensor | None = None  # int64 [1], where the next one goes, on the device
        self._first, self._n_pending = 0, 0  # the column of the first of them in the tail, and how many there are
        self._n_columns, self._n_left = 0, 0  # tokens behind the packed pairs, and those until pairs are evicted
        self._block: dict[int, torch.Tensor] = {}  # scores of a forward of several tokens

    # What a forward does --------------------------------------------------------------------------------------------

    def begin(self, cache: Any, n_tokens: int) -> None:
        """A forward of ``n_tokens`` behind ``cache`` begins."""
        layers, self._padding = _ragged_layers(cache)
        if any(layer.packed.scores is None for layer in layers.values()) or not layers:
            raise CacheMismatchError(
                "expected a cache that this press has compressed, whose pairs carry scores, to evict while the model "
                f"writes, got one without ({len(layers)} compressed layers)"
            )
        self._follow(layers)
        if n_tokens > 1 or next(iter(layers.values())).batch_size != self._batch_size:
            self._flush()
        self._reading, self._block = n_tokens, {}

    def look(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        """Sees what enters the attention of a layer."""
        if self._reading > 1:
            self._block[layer_idx] = self.score(layer_idx, hidden_states)
        elif self._reading or self.in_static_step:
            self._states[layer_idx] = hidden_states

    def end(self) -> bool:
        """The forward is over. Returns whether pairs were evicted."""
        n_tokens, self._reading = self._reading, 0
        if n_tokens == 1:
            self._advance()
            return self.written()
        for layer_idx, scores in self._block.items():
            columns = self._layers[layer_idx].tail.scores
            assert columns is not None
            old = columns[:, :, -n_tokens:]
            token = torch.ones_like(scores, dtype=torch.bool)
            if self._padding is not None:  # over a row's padding its earlier tokens have moved, with their scores
                token &= visible_columns(self._padding.to(scores.device), n_tokens).unsqueeze(1)
            old.copy_(torch.where(token, scores, old))
        self._block = {}
        self._n_left -= n_tokens
        return self._evict_if_due()

    def abandon(self) -> None:
        """No forward runs; the last one may have raised."""
        self._reading, self._block, self._states = 0, {}, {}

    def finish(self) -> None:
        """Scores what is pending: nothing is lost when the model is no longer watched."""
        self.abandon()
        if self._layers:
            self._forget_what_was_cut()
            self._flush()

    def _advance(self) -> None:
        """Puts the hidden states of a token in the buffer, those of all layers at once, and moves on: on the device."""
        states = torch.stack(list(self._states.values()))
        layers, batch, _, hidden_size = states.shape
        if self._hidden is None or self._hidden.shape[1] != batch:
            self._hidden = states.new_empty(layers, batch, self.buffer, hidden_size)
        if self._slot is None:
            self._slot = torch.full((1,), self._n_pending, device=states.device)
        self._hidden.index_copy_(2, self._slot, states)
        self._slot.add_(1)
        self._states = {}

    def written(self) -> bool:
        """One more token is in the tails, its hidden states in the buffer. Returns whether pairs were evicted."""
        if self._n_pending == 0:
            self._first = self._length - 1
        self._n_pending += 1
        self._n_left -= 1
        if self._n_pending == self.buffer or self._n_left <= 0:
            self._flush()
        return self._evict_if_due()

    # Static steps ---------------------------------------------------------------------------------------------------

    @contextmanager
    def static_step(self) -> Iterator[None]:
        """While open, a decode step of one token over static layers: it only writes hidden states."""
        self.in_static_step = True
        try:
            yield
            self._advance()
        finally:
            self.in_static_step = False

    def restart_static_steps(self, cache: Any) -> None:
        """The next static step is the first behind ``cache``; what was run on trial did not count."""
        self._follow(_ragged_layers(cache)[0])
        self._settle()

    def tokens_to_eviction(self, cache: Any) -> int:
        """How many tokens can be read, one by one, until pairs are evicted."""
        self._follow(_ragged_layers(cache)[0])
        return self._n_left

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _any(self) -> RaggedLayer:
        return next(iter(self._layers.values()))

    @property
    def _length(self) -> int:
        return self._any.tail.length

    @property
    def _batch_size(self) -> int:
        return self._any.batch_size if self._hidden is None else self._hidden.shape[1]

    def _follow(self, layers: dict[int, RaggedLayer]) -> None:
        """Turns to a cache; what is pending of another is scored first, what was cut off since is forgotten."""
        is_same = bool(self._layers) and all(layers.get(i) is layer for i, layer in self._layers.items())
        if self._layers and not is_same:
            self._forget_what_was_cut()
            self._flush()
        if len(devices := {layer.packed.keys.device for layer in layers.values()}) > 1:
            raise UnsupportedCacheError(
                f"expected a model on one device to evict while it writes, got layers on {sorted(map(str, devices))}"
            )
        self._layers = layers
        if is_same and self._length == self._n_columns:
            return
        self._forget_what_was_cut()
        self._n_left = max(self.budget + self.buffer - int(held_tokens(list(layers.values())).max()), 1)

    def _forget_what_was_cut(self) -> None:
        self._n_pending = max(min(self._n_pending, self._length - self._first), 0)
        self._settle()

    def _flush(self) -> None:
        """Scores the tokens in the buffer."""
        if self._n_pending:
            columns = slice(self._first, self._first + self._n_pending)
            assert self._hidden is not None
            for hidden, (layer_idx, layer) in zip(self._hidden, self._layers.items(), strict=True):
                assert layer.tail.scores is not None
                layer.tail.scores[:, :, columns] = self.score(layer_idx, hidden[:, : self._n_pending])
        self._n_pending = 0
        self._settle()

    def _settle(self) -> None:
        if self._slot is not None:
            self._slot.fill_(self._n_pending)

    def _evict_if_due(self) -> bool:
        self._n_columns = self._length
        if self._n_left > 0:
            return False
        layers: Sequence[RaggedLayer] = list(self._layers.values())
        due = held_tokens(layers) >= self.budget + self.buffer
        PairPool.of(layers).evict(layers, due, budget=self.budget, window_size=self.buffer, allocation=self.allocation)
        give_back_room(layers, self.buffer)
        self._n_columns, self._n_left = 0, self.budget + self.buffer - int(held_tokens(layers).max())
        return True


def _ragged_layers(cache: Any) -> tuple[dict[int, RaggedLayer], torch.Tensor | None]:
    """The ragged layers by index, and the padding of the block that is read behind them."""
    padding = next((layer.padding for layer in cache.layers if isinstance(layer, BlockLayer)), None)
    layers = {i: layer.layer if isinstance(layer, BlockLayer) else layer for i, layer in enumerate(cache.layers)}
    return {i: layer for i, layer in layers.items() if isinstance(layer, RaggedLayer)}, padding
