"""``with press(model):`` - hooks on the decoder that compress the cache when a prefill forward ends.

A multimodal wrapper passes its text decoder embeddings and masks that it made itself, so two more hooks record what the
wrapper was called with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvzip_press import compat
from kvzip_press.attention.implementation import attached, attention_watched
from kvzip_press.cache.compressible import check_cache
from kvzip_press.cache.padded_block import BlockLayer
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.decoding.eviction import DecodeEviction, DecodeEvictions
from kvzip_press.decoding.static_layers import StaticLayer
from kvzip_press.errors import InvalidArgumentError, KVzipPressError, UnsupportedCacheError
from kvzip_press.model.structure import check_keeps_cache, full_attention_layers, text_decoder
from kvzip_press.model.watching import OpenFor, after_forward, before_forward, computing
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.prefilling.call import PrefillCall
from kvzip_press.prefilling.eviction import check_storage, pack_prefix
from kvzip_press.prefilling.query_window import READING, LastQueries, Reading
from kvzip_press.prefilling.self_check import SelfCheck
from kvzip_press.prefilling.whole import Scorer

if TYPE_CHECKING:
    from torch import nn


class SessionPress(Scorer, Protocol):
    """The part of a press that a session needs."""

    @property
    def storage(self) -> str:
        """The name of how kept pairs are stored."""

    def decode_eviction(self, model: nn.Module) -> DecodeEviction | None:
        """Returns what evicts while the model generates, a new one with each call; None if nothing does."""


@contextmanager
def compressing(press: SessionPress, model: nn.Module, *, cold: str | None = None) -> Iterator[None]:
    """The context manager behind ``with press(model):``.

    A forward over an empty cache, or over more than one token, is a prefill: when it ends, the new tokens' pairs are
    compressed in place. What a dense cache held before (a system prompt, say) stays whole. With a press that evicts
    while the model generates, only the first prefill is compressed: what is read after it counts as generated. The
    model stays attached afterwards, so that the cache can be used; an error undoes that, too, if it was not attached
    before.

    It is about this thread: a forward of the same model in another thread is not compressed, and may be in a context of
    its own. A thread that shall see this one runs in a copy of the context (``contextvars.copy_context().run``).

    Args:
        press: The press.
        model: The model.
        cold: "cpu" to keep what is evicted in host memory, for :meth:`kvzip_press.RaggedCache.restore`.

    Raises:
        InvalidArgumentError: The press's storage cannot hold the model's keys and values; or ``cold`` is something else
            (there may be several prefills inside, which would share a file), or is given with a press that evicts while
            the model generates.
        UnsupportedModelError: The model has no layer that can be compressed.
        KVzipPressError: The model is already inside ``with press(model):`` in this thread.
    """
    full_attention_layers(model)
    check_storage(model, press.storage)
    decoder = text_decoder(model)
    if _SESSIONS.of(decoder) is not None:
        raise KVzipPressError("expected one press at a time: the model is already inside `with press(model):`")
    with ExitStack() as stack:
        session = _Session(press, model, cold)
        stack.enter_context(attached(model))
        stack.enter_context(compat.uncompiled(model))
        stack.callback(session.close)
        stack.enter_context(session.evictions.opened())
        stack.enter_context(_SESSIONS.opened(decoder, session))
        if decoder is not model:
            stack.enter_context(before_forward(model, session.enter, is_mine=session.is_open_here))
            stack.enter_context(after_forward(model, session.leave, is_mine=session.is_open_here, always=True))
        stack.enter_context(before_forward(decoder, session.before, is_mine=session.is_open_here))
        stack.enter_context(after_forward(decoder, session.after, is_mine=session.is_open_here, always=True))
        yield


_SESSIONS: OpenFor[_Session] = OpenFor("kvzip_press_session")


class _Forward(threading.local):
    """The forward that a thread is running.

    Args:
        watching: Gets what watches it, for whoever has to end that.
    """

    def __init__(self, watching: list[ExitStack]) -> None:
        self.busy = False  # scoring runs forwards of its own
        self.start = 0
        self.outer: PrefillCall | None = None  # the model's own call, while it runs
        self.watching = ExitStack()
        watching.append(self.watching)
        self.check: SelfCheck | None = None
        self.last_queries: LastQueries | None = None
        self.observers: dict[Scorer, Any] = {}
        self.eviction: DecodeEviction | None = None  # what sees tokens that count as generated

    def close(self) -> None:
        """Stops watching."""
        self.watching.close()
        self.check, self.last_queries, self.observers, self.eviction = None, None, {}, None


class _Session:
    """The state of one ``with press(model):``; it ends with the context."""

    def __init__(self, press: SessionPress, model: nn.Module, cold: str | None) -> None:
        self.press, self.model, self.cold = press, model, cold
        self._watching: list[ExitStack] = []
        self.forward = _Forward(self._watching)
        self.evictions = DecodeEvictions(press.decode_eviction, model)
        if cold is not None and (cold != "cpu" or self.evictions):
            raise InvalidArgumentError(
                "expected cold=None or cold='cpu' in `with press(model, cold=...):`, and None with a press that evicts "
                f"while the model generates, got {str(cold)!r:.80}"
            )

    def is_open_here(self) -> bool:
        """Whether the thread that calls this is inside the context."""
        return self in _SESSIONS

    def close(self) -> None:
        """Stops watching, also forwards that other threads are running."""
        for watching in self._watching:
            watching.close()

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records what the whole model is called with."""
        self.forward.outer = PrefillCall.of(model, args, kwargs)

    def leave(self, model: nn.Module, *_: Any) -> None:
        """Forgets the recorded call, also after a forward that raised."""
        self.forward.outer = None

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what cannot be compressed before anything is computed, and lets the press watch."""
        forward = self.forward
        if forward.busy:  # a press scores
            return
        forward.close()
        call = PrefillCall.of(decoder, args, kwargs).within(forward.outer)
        if _is_static_step(call.cache):
            return
        _check_fills_a_cache(call, decoder)
        forward.start = call.n_seen
        if self.evictions and forward.start and _is_compressed(call.cache):
            _check_is_whole(call)
            forward.eviction = self.evictions.of(call.cache)
            forward.eviction.begin(call.cache, call.query_length)
            return
        if call.cache is not None:
            check_cache(call.cache)
        if call.is_prefill or self.evictions:  # a dense cache that was filled before is not left to grow
            self._watch(call)

    def _watch(self, call: PrefillCall) -> None:
        """Looks at a prefill that begins."""
        forward = self.forward
        if compat.in_assisted_decoding():
            raise UnsupportedCacheError(
                "expected a prompt or a later turn inside `with press(model):`, got candidates of assisted decoding or "
                "prompt look-up, which are read to be taken back, and what is compressed cannot be: generate without "
                "them, or compress the prompt first and generate after the `with` block"
            )
        valid = call.valid()
        call.positions(forward.start, valid)
        visible = valid
        if not _is_compressed(call.cache):
            prefix = call.valid_before(forward.start)
            visible = torch.cat([prefix, valid], dim=1)
            if self.evictions:
                self.evictions.of(call.cache).schedule.check_prefix(int(prefix.sum(dim=-1).max()))
        forward.watching.enter_context(computing())
        forward.check = SelfCheck(self.model, visible)
        forward.watching.enter_context(attention_watched(self.model, forward.check, valid=visible))
        forward.last_queries = forward.watching.enter_context(LastQueries(self.model, valid, 1))
        reading = Reading(valid, forward.start, call.ids_read(self.model))
        forward.watching.enter_context(READING.opened(self.model, reading))
        observer = self.press.observer(self.model)
        if observer is not None:
            forward.watching.enter_context(observer)
            forward.observers = {self.press: observer}

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compresses the span that was just read; after a forward that raised, it only stops watching."""
        forward = self.forward
        if forward.busy:
            return
        observers, start, check, eviction = forward.observers, forward.start, forward.check, forward.eviction
        last_queries = forward.last_queries
        forward.close()
        if output is None:
            if eviction is not None:
                eviction.abandon()
            return
        if eviction is not None:
            eviction.end()
            return
        if check is None or last_queries is None:
            return  # a decode step
        call = PrefillCall.of(decoder, args, kwargs).within(forward.outer)
        cache = compat.cache_after(output, call.cache)
        weights = weights_fingerprint(text_decoder(self.model))  # the host looks while the device still reads
        check.finish(cache)
        forward.busy = True
        try:
            with torch.no_grad():
                if start and not _is_compressed(cache):
                    valid = call.valid()
                    positions = call.positions(start, valid)
                    scored, storage = bool(self.evictions), self.press.storage
                    before = call.valid_before(start)
                    pack_prefix(self.model, cache, before, positions, scored=scored, storage=storage)
                prefill = call.prefill(self.model, cache, start, observers, weights, last_queries)
                prefill.evict_in_place(self.press.score(prefill), cold=self.cold)
        finally:
            forward.busy = False


def _is_static_step(cache: Any) -> bool:
    """Returns whether a cache is that of a static decode step, whose own cache was checked when it was made."""
    return any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ()))


def _check_fills_a_cache(call: PrefillCall, decoder: nn.Module) -> None:
    """Raises if a forward will leave no keys and values to compress."""
    if call.use_cache is False:
        raise UnsupportedCacheError("expected use_cache=True inside `with press(model):`, got use_cache=False")
    config: Any = decoder.config
    if call.cache is None and call.use_cache is None and getattr(config, "use_cache", True) is False:
        raise UnsupportedCacheError("expected a cache to fill inside `with press(model):`, got config.use_cache=False")
    check_keeps_cache(decoder)


def _check_is_whole(call: PrefillCall) -> None:
    """Raises if some of the columns that are read into a cache, from which pairs are evicted, are padding.

    They would lie among a row's pairs. Our own forwards move rows over it.
    """
    is_moved = any(isinstance(layer, BlockLayer) for layer in call.cache.layers)
    if call.query_length > 1 and not is_moved and not bool(call.valid().all()):
        raise InvalidArgumentError(
            "expected rows that read as many tokens behind a prompt, under a press that evicts while the model writes, "
            "got an attention mask with padding among the new ones: use kvzip_press.generate(model, cache, input_ids, "
            "..., attention_mask=mask) or answer, which move rows over it, or read these rows one by one"
        )


def _is_compressed(cache: Any) -> bool:
    return any(isinstance(layer, RaggedLayer | BlockLayer) for layer in getattr(cache, "layers", ()))
