"""Evicts pairs while a model generates, so that the cache stays within a budget however long the answer is.

Two parts that know nothing of each other are composed: a scorer decides what pairs are worth
(:mod:`kvzip_press.decoding.scorer`), a schedule when a row is cut, and to how much. Scores are stored in the cache's
layers; the state here is that of the running forwards, for one cache at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kvzip_press.budget.allocators import Allocation
from kvzip_press.budget.amount import Tokens
from kvzip_press.budget.policy import Policy
from kvzip_press.cache.padded_block import BlockLayer
from kvzip_press.cache.pair_pool.eviction import evict
from kvzip_press.cache.pair_pool.worth import held_tokens
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.recall.recalled_pairs import RecalledPairs
from kvzip_press.cache.tail import BLOCK
from kvzip_press.decoding.scorer import DecodeScorer, Layers
from kvzip_press.errors import InvalidArgumentError, UnsupportedCacheError
from kvzip_press.model.structure import text_decoder
from kvzip_press.model.watching import OpenFor


@dataclass(frozen=True)
class Schedule:
    """When a row is cut, and to how much.

    A row that reaches ``budget + buffer`` tokens' worth of pairs (on average over its heads) is cut to ``budget``,
    whatever the other rows hold; it holds more only during a forward of several tokens.

    Args:
        budget: Tokens' worth of pairs that stay, more than ``buffer``.
        buffer: Tokens between two evictions, at least 1.
        recent: How many last tokens stay in every head, as far as the budget allows; fewer than ``budget``. None for
            ``buffer``.
        protect_prompt: Whether what the cache holds before the model writes stays; the budget is then for what comes
            after it.

    Raises:
        InvalidArgumentError: A number is out of range.
    """

    budget: int
    buffer: int
    recent: int | None = None
    protect_prompt: bool = False

    def __post_init__(self) -> None:
        recent = self.buffer if self.recent is None else self.recent
        if any(type(number) is not int for number in (self.budget, self.buffer, recent)):
            raise InvalidArgumentError(
                f"expected budget, buffer and recent as integers, got {self.budget!r}, {self.buffer!r} and {recent!r}"
            )
        if self.buffer < 1 or not 0 <= recent < self.budget:
            raise InvalidArgumentError(
                "expected a buffer of 1 or more tokens and a budget of more than the last tokens that stay, got "
                f"buffer={self.buffer}, budget={self.budget} and {recent} last tokens"
            )

    @property
    def limit(self) -> int:
        """Tokens' worth of pairs at which a row is cut."""
        return self.budget + self.buffer

    def tokens_left(self, layers: Sequence[RaggedLayer]) -> int:
        """Returns how many tokens can be read until a row is due."""
        return self.limit - int(held_tokens(layers).max())

    def due(self, layers: Sequence[RaggedLayer]) -> torch.Tensor:
        """Returns which rows are cut now, bool ``[batch]``."""
        return held_tokens(layers) >= self.limit

    def budgets(self, layers: Sequence[RaggedLayer]) -> list[int]:
        """Returns to how many tokens' worth of pairs each row is cut."""
        return [self.budget] * layers[0].batch_size

    def check_prefix(self, n_tokens: int) -> None:
        """Raises InvalidArgumentError if a dense cache of ``n_tokens`` tokens, which all stay, leaves no room.

        Nothing says what the pairs of a cache are worth that was filled outside of ``with press(model):``.
        """
        if not self.protect_prompt and n_tokens >= self.budget:
            raise InvalidArgumentError(
                f"expected a budget of more than the {n_tokens} protected first tokens, got {self.budget}: they came "
                "in a dense cache that was filled outside of `with press(model):`, so all of it stays. Read them "
                "inside, or compress them before (`compress`), so that the press evicts from them; or leave the budget "
                "to what follows, with protect_prompt=True"
            )

    def window(self, n_protected: int) -> int:
        """Returns how many last tokens every head keeps if the first ``n_protected`` stay in any case.

        Raises:
            InvalidArgumentError: The protected tokens leave no room.
        """
        room = self.budget - n_protected
        if room < 1:
            raise InvalidArgumentError(
                f"expected a budget of more than the {n_protected} protected first tokens, got {self.budget}"
            )
        return min(self.buffer if self.recent is None else self.recent, room - 1)


class DecodeEviction:
    """Keeps caches within a budget while the model reads and generates tokens.

    Args:
        scorer: Scores the pairs of new tokens.
        schedule: When pairs are evicted, and how many stay.
        allocation: How pairs compete for the budget.
    """

    def __init__(self, scorer: DecodeScorer, schedule: Schedule, allocation: Allocation) -> None:
        self.scorer, self.schedule = scorer, schedule
        self.policy = Policy(Tokens(schedule.budget), allocation)
        self._reading = 0  # tokens of the running forward
        self._layers: Layers = {}  # of the cache that was read last
        self._is_met = False  # whether they are prepared: a forward that failed may have undone that
        self._padding: torch.Tensor | None = None  # of the block that is read
        self._n_columns, self._n_left = 0, 0  # tokens after the packed pairs, and those left until pairs are evicted

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While open, this object sees what it needs of the model's forwards in this thread."""
        with ExitStack() as stack:
            stack.callback(self.finish)
            stack.enter_context(self.scorer.watching(model))
            yield

    # What a forward does --------------------------------------------------------------------------------------------

    def begin(self, cache: Any, n_tokens: int) -> None:
        """Called when a forward begins that reads ``n_tokens`` tokens into ``cache``.

        Raises:
            CacheMismatchError: The cache was not compressed by this press: its pairs carry no scores.
            UnsupportedCacheError: Its layers are on several devices, or recall pairs.
        """
        layers, self._padding = _ragged_layers(cache)
        self._follow(layers)
        self._reading = n_tokens
        self.scorer.begin(layers, n_tokens)

    def end(self) -> bool:
        """Called when the forward is over, if it did not raise. Returns whether pairs were evicted."""
        n_tokens, self._reading = self._reading, 0
        if n_tokens == 1:
            self.scorer.seen()
            return self.written()
        self.scorer.read(self._layers, n_tokens, self._padding)
        self._n_left -= n_tokens
        return self._evict_if_due()

    def abandon(self) -> None:
        """Called when the forward has raised: its layers may be what they were before the cache was met."""
        self._reading, self._is_met = 0, False
        self.scorer.abandon()

    def follows(self, cache: Any) -> bool:
        """Whether this is the cache that was read last."""
        return self._is_followed(_ragged_layers(cache)[0])

    def finish(self) -> None:
        """Scores pending tokens and forgets the cache, so that nothing is lost when something else goes on with it."""
        self.abandon()
        if self._layers:
            self._leave()

    def written(self) -> bool:
        """Called when one more token is in the tails and the scorer has seen it. Returns whether pairs were evicted."""
        self.scorer.written(self._layers)
        self._n_left -= 1
        return self._evict_if_due()

    # Static steps ---------------------------------------------------------------------------------------------------

    @contextmanager
    def static_step(self) -> Iterator[None]:
        """While open, a decode step of one token over static layers runs, which only shows the scorer its token."""
        self.scorer.begin(self._layers, 1)
        try:
            yield
            self.scorer.seen()
        finally:
            self.scorer.abandon()

    def restart_static_steps(self, cache: Any) -> None:
        """Makes the next static step the first one after ``cache``; steps that were only trials do not count."""
        self._follow(_ragged_layers(cache)[0])
        self.scorer.cut_to(self._layers)

    def tokens_to_eviction(self, cache: Any) -> int:
        """Returns how many tokens can be read, one by one, until pairs are evicted."""
        self._follow(_ragged_layers(cache)[0])
        return self._n_left

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _length(self) -> int:
        return next(iter(self._layers.values())).tail.length

    def _follow(self, layers: Layers) -> None:
        """Switches to a cache.

        Tokens of another cache that are pending are scored first; those that were cut off since are forgotten.
        """
        if self._reading:  # torch calls no hook of a forward that was interrupted
            self.abandon()
        is_same = self._is_followed(layers)
        if self._layers and not is_same:
            self._leave()
        is_same = is_same and self._is_met
        if len(devices := {layer.packed.device for layer in layers.values()}) > 1:
            raise UnsupportedCacheError(
                f"expected a model on one device to evict while it writes, got layers on {sorted(map(str, devices))}"
            )
        if any(isinstance(layer.packed, RecalledPairs) for layer in layers.values()):
            raise UnsupportedCacheError(
                "expected a cache without recall under a press that evicts while the model writes, got one whose steps "
                "read a part of it: call without_recall(cache) first"
            )
        if not is_same:
            _part_rows(layers)
            self.scorer.adopt(layers, stays=self.schedule.protect_prompt)
            for layer in layers.values():
                layer.tail.block = min(BLOCK, self.schedule.buffer)  # no room for what will not be there
        self._layers, self._is_met = layers, True
        if is_same and self._length == self._n_columns:
            return
        self.scorer.cut_to(layers)
        self._expect(max(self.schedule.tokens_left(list(layers.values())), 1))

    def _is_followed(self, layers: Layers) -> bool:
        return bool(self._layers) and all(layers.get(i) is layer for i, layer in self._layers.items())

    def _evict_if_due(self) -> bool:
        self._n_columns = self._length
        if self._n_left > 0:
            return False
        self.scorer.settle(self._layers)
        layers = list(self._layers.values())
        due, budgets = self.schedule.due(layers), self.schedule.budgets(layers)
        protected = [0] * len(due) if self.schedule.protect_prompt else layers[0].n_protected
        window_sizes = torch.tensor([self.schedule.window(n) for n in protected]).to(due.device, non_blocking=True)
        for budget in sorted(set(budgets)):  # one for all rows, but where it depends on their length
            worth = self.scorer.worth(self._layers)
            policy = replace(self.policy, amount=Tokens(budget))
            mine = due & torch.tensor([one == budget for one in budgets]).to(due.device, non_blocking=True)
            evict(self._layers, mine, policy=policy, window_sizes=window_sizes, worth=worth)
        self._expect(self.schedule.tokens_left(layers))
        for layer in layers:
            layer.tail.give_back_room(self.schedule.buffer)
        return True

    def _expect(self, n_left: int) -> None:
        """Notes that pairs are evicted behind ``n_left`` more tokens, for which tails get room, and for no more."""
        self._n_columns, self._n_left = self._length, n_left
        for layer in self._layers.values():
            layer.tail.most = self._length + n_left

    def _leave(self) -> None:
        """Forgets the cache; its tokens that are pending are scored first, and those that were cut off forgotten."""
        self.scorer.cut_to(self._layers)
        self.scorer.settle(self._layers)
        for layer in self._layers.values():
            layer.tail.most = None
        self._layers = {}


class DecodeEvictions:
    """What evicts in one ``with press(model):``: a :class:`DecodeEviction` for each thread that runs in its context.

    A cache is one thread's at a time. When another thread goes on with it, the tokens that still wait for their scores
    get them first.

    Args:
        make: Returns a new one for the model; None if nothing evicts.
        model: The model.
    """

    def __init__(self, make: Callable[[nn.Module], DecodeEviction | None], model: nn.Module) -> None:
        self._make, self._model = make, model
        self._spare = make(model)  # raises at once if it cannot be made
        self._evicts = self._spare is not None
        self._of_threads: dict[int, tuple[DecodeEviction, ExitStack]] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self._evicts

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, :func:`decode_eviction_in` finds this; at the end, pending tokens get their scores."""
        try:
            with _OPEN.opened(text_decoder(self._model), self):
                yield
        finally:
            for _, watching in self._of_threads.values():
                watching.close()

    def of(self, cache: Any) -> DecodeEviction:
        """Returns the running thread's, for a forward over ``cache``."""
        mine = threading.get_ident()
        with self._lock:
            if mine not in self._of_threads:
                self._forget_ended_threads()
                self._of_threads[mine] = self._new()
            for thread, (eviction, _) in self._of_threads.items():
                if thread != mine and eviction.follows(cache):
                    eviction.finish()
            return self._of_threads[mine][0]

    def _new(self) -> tuple[DecodeEviction, ExitStack]:
        eviction, self._spare = self._spare or self._make(self._model), None
        assert eviction is not None
        watching = ExitStack()
        watching.enter_context(eviction.watching(self._model))
        return eviction, watching

    def _forget_ended_threads(self) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        for thread in set(self._of_threads) - alive:
            self._of_threads.pop(thread)[1].close()


_OPEN: OpenFor[DecodeEvictions] = OpenFor("kvzip_press_decode_evictions")


def decode_eviction_in(model: nn.Module, cache: Any) -> DecodeEviction | None:
    """Returns what evicts from ``cache`` while the model generates in this thread; None if nothing does."""
    found = _OPEN.of(text_decoder(model))
    return found.of(cache) if found else None


def _part_rows(layers: Layers) -> None:
    """Gives rows that share a context (several questions about one) pairs of their own: each loses what it would alone.

    Only when a cache is met: what rearranges rows while the model writes (beam search) is refused at the next eviction.
    """
    for layer in layers.values():
        if layer.row_index is not None:
            layer.batch_select_indices(torch.arange(layer.batch_size))


def _ragged_layers(cache: Any) -> tuple[dict[int, RaggedLayer], torch.Tensor | None]:
    """Returns the ragged layers by index, and the padding of the block that is being read, None if there is none."""
    padding = next((layer.padding for layer in cache.layers if isinstance(layer, BlockLayer)), None)
    layers = {i: layer.layer if isinstance(layer, BlockLayer) else layer for i, layer in enumerate(cache.layers)}
    return {i: layer for i, layer in layers.items() if isinstance(layer, RaggedLayer)}, padding
