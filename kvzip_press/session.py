"""``with press(model):`` - hooks on the decoder that compress the cache when a prefill forward ends.

A multimodal wrapper passes its text decoder embeddings and masks that it made itself, so two more hooks record what the
wrapper was called with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvzip_press import compat
from kvzip_press.attention.implementation import attach, attention_watched, detach, is_attached
from kvzip_press.cache.compressible import check_cache, check_continues
from kvzip_press.decoding.eviction import DecodeEviction
from kvzip_press.errors import KVzipPressError, UnsupportedCacheError
from kvzip_press.model.structure import check_keeps_cache, full_attention_layers, text_decoder
from kvzip_press.prefilling.call import PrefillCall
from kvzip_press.prefilling.self_check import SelfCheck
from kvzip_press.prefilling.whole import Scorer

if TYPE_CHECKING:
    from torch import nn


class SessionPress(Scorer, Protocol):
    """The part of a press that a session needs."""

    def decode_eviction(self, model: nn.Module) -> DecodeEviction | None:
        """Returns what evicts while the model generates, for one session; None if nothing does."""


@contextmanager
def compressing(press: SessionPress, model: nn.Module) -> Iterator[None]:
    """The context manager behind ``with press(model):``.

    A forward over an empty cache, or over more than one token, is a prefill: when it ends, the new tokens' pairs are
    compressed in place. With a press that evicts while the model generates, only the first of them is: what is read
    after it counts as generated. The model stays attached afterwards, so that the cache can be used; an error undoes
    that, too, if it was not attached before.

    Raises:
        UnsupportedModelError: The model has no layer that can be compressed.
        KVzipPressError: The model is already inside ``with press(model):``.
    """
    full_attention_layers(model)
    decoder = text_decoder(model)
    if _session_of(model) is not None:
        raise KVzipPressError("expected one press at a time: the model is already inside `with press(model):`")
    was_attached = is_attached(model)
    with ExitStack() as stack:
        session = _Session(press, model)
        attach(model)
        stack.enter_context(compat.uncompiled(model))
        stack.callback(session.close)
        if decoder is not model:
            stack.callback(model.register_forward_pre_hook(session.enter, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(session.leave, always_call=True).remove)
        stack.callback(decoder.register_forward_pre_hook(session.before, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(session.after, with_kwargs=True).remove)
        if session.decode is not None:  # its hook has to come last: it ends what `after` looks at
            stack.enter_context(session.decode.watching(model))
        try:
            yield
        except BaseException:
            if not was_attached:
                detach(model)
            raise


def _session_of(model: nn.Module) -> _Session | None:
    hooks = text_decoder(model)._forward_hooks.values()  # noqa: SLF001  # torch has no public name for them
    found = (getattr(hook, "__self__", None) for hook in hooks)
    return next((session for session in found if isinstance(session, _Session)), None)


class _Session:
    """The state of one ``with press(model):``; it ends with the context."""

    def __init__(self, press: SessionPress, model: nn.Module) -> None:
        self.press, self.model = press, model
        self.busy = False  # scoring runs forwards of its own
        self.start = 0
        self.outer: PrefillCall | None = None  # the model's own call, while it runs
        self.watching = ExitStack()  # what watches the running forward
        self.check: SelfCheck | None = None
        self.observers: dict[Scorer, Any] = {}
        self.decode = press.decode_eviction(model)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records what the whole model is called with."""
        self.outer = PrefillCall.of(model, args, kwargs)

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forgets the recorded call, also after a forward that raised."""
        self.outer = None

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what cannot be compressed before anything is computed, and lets the press watch."""
        if self._is_ours:
            return
        self.close()
        call = PrefillCall.of(decoder, args, kwargs).within(self.outer)
        if call.use_cache is False:
            raise UnsupportedCacheError("expected use_cache=True inside `with press(model):`, got use_cache=False")
        check_keeps_cache(decoder)
        self.start = call.n_seen
        if self.decode is not None and self.start:
            self.decode.begin(call.cache, call.query_length)
            return
        if call.cache is not None:
            check_cache(call.cache)
            check_continues(self.model, call.cache)
        elif call.use_cache is None and getattr(decoder.config, "use_cache", True) is False:
            raise UnsupportedCacheError(
                "expected a cache to fill inside `with press(model):`, got config.use_cache=False"
            )
        if not call.is_prefill:
            return
        valid = call.valid()
        call.positions(self.start, valid)
        self.check = SelfCheck(self.model, valid)
        self.watching.enter_context(attention_watched(self.check))
        observer = self.press.observer(self.model)
        if observer is not None:
            self.watching.enter_context(observer)
            self.observers = {self.press: observer}

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compresses the span that was just read."""
        if self._is_ours:
            return
        if self.decode is not None and self.start:
            self.decode.end()
            return
        observers, start, check = self.observers, self.start, self.check
        self.close()
        if check is None:
            return  # a decode step
        call = PrefillCall.of(decoder, args, kwargs).within(self.outer)
        cache = compat.cache_after(output, call.cache)
        check.finish(cache)
        self.busy = True
        try:
            with torch.no_grad():
                prefill = call.prefill(self.model, cache, start, observers)
                prefill.evict_in_place(self.press.score(prefill))
        finally:
            self.busy = False

    @property
    def _is_ours(self) -> bool:
        """Whether the forward is not the user's, because a press scores or a static decode step runs."""
        return self.busy or (self.decode is not None and self.decode.in_static_step)

    def close(self) -> None:
        """Stops watching (also after a forward that raised)."""
        self.watching.close()
        self.check, self.observers = None, {}
