"""``with press(model):`` - hooks on the decoder that compress the cache when a prefill forward ends.

A multimodal wrapper hands its text decoder embeddings and masks of its own making, so what the wrapper itself was
called with is noted by two more.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press.attention.implementation import attach, attention_watched, detach, is_attached
from kvzip_press.decoding.eviction import DecodeEviction
from kvzip_press.errors import InvalidArgumentError, KVzipPressError, UnsupportedCacheError
from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.model.structure import full_attention_layers, text_decoder
from kvzip_press.prefilling.eviction import check_cache
from kvzip_press.prefilling.self_check import SelfCheck
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import Press

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def compressing(press: Press, model: nn.Module) -> Iterator[None]:
    """The context manager behind ``with press(model):``.

    A forward over an empty cache, or over more than one token, is a prefill: when it ends, the new tokens' pairs are
    compressed in place. With a press that evicts while the model writes, that is the first of them only: what is read
    behind it counts as written. The model stays attached afterwards, so that the cache can be used; an error undoes
    that too.
    """
    full_attention_layers(model)
    decoder = text_decoder(model)
    if _session_of(model) is not None:
        raise KVzipPressError("expected one press at a time: the model is already inside `with press(model):`")
    was_attached = is_attached(model)
    with ExitStack() as stack:
        session = _Session(press, model)
        attach(model)
        stack.callback(session.close)
        if session.decode is not None:
            stack.callback(session.decode.finish)
            stack.enter_context(watching_hidden_states(model, session.decode.look))
        if decoder is not model:
            stack.callback(model.register_forward_pre_hook(session.enter, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(session.leave, always_call=True).remove)
        stack.callback(decoder.register_forward_pre_hook(session.before, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(session.after, with_kwargs=True).remove)
        try:
            yield
        except BaseException:
            if not was_attached:
                detach(model)
            raise


def decode_eviction_in(model: nn.Module) -> DecodeEviction | None:
    """What evicts while the model writes, inside ``with press(model):`` of a press that does; else None."""
    session = _session_of(model)
    return None if session is None else session.decode


def _session_of(model: nn.Module) -> _Session | None:
    hooks = text_decoder(model)._forward_hooks.values()  # noqa: SLF001  # torch has no public name for them
    found = (getattr(hook, "__self__", None) for hook in hooks)
    return next((session for session in found if isinstance(session, _Session)), None)


class _Session:
    """The state of one ``with press(model):``; it ends with the context."""

    def __init__(self, press: Press, model: nn.Module) -> None:
        self.press, self.model = press, model
        self.busy = False  # scoring runs forwards of its own
        self.start = 0
        self.outer: _Call | None = None  # the model's own call, while it runs
        self.watching = ExitStack()  # what looks at the forward that runs
        self.check: SelfCheck | None = None
        self.observers: dict[Press, Any] = {}
        self.decode = press.decode_eviction(model)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes what the whole model is called with."""
        self.outer = _Call.of(model, args, kwargs)

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forgets it, also after a forward that raised."""
        self.outer = None

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what cannot be compressed before anything is computed, and lets the press watch."""
        if self._is_ours:
            return
        self.close()
        call = _Call.of(decoder, args, kwargs).within(self.outer)
        if call.use_cache is False:
            raise UnsupportedCacheError("expected use_cache=True inside `with press(model):`, got use_cache=False")
        self.start = call.n_seen
        if self.decode is not None and self.start:
            self.decode.begin(call.cache, call.query_length)
            return
        if call.cache is not None:
            check_cache(call.cache)
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
        check.finish(output.past_key_values)
        call = _Call.of(decoder, args, kwargs).within(self.outer)
        self.busy = True
        try:
            with torch.no_grad():
                prefill = call.prefill(self.model, output.past_key_values, start, observers)
                prefill.evict_in_place(self.press.score(prefill))
        finally:
            self.busy = False

    @property
    def _is_ours(self) -> bool:
        """Whether the forward is not the user's: a press scores, or a static decode step runs."""
        return self.busy or (self.decode is not None and self.decode.in_static_step)

    def close(self) -> None:
        """Stops watching (also after a forward that raised)."""
        self.watching.close()
        if self.decode is not None:
            self.decode.abandon()
        self.check, self.observers = None, {}


class _Call:
    """The arguments of a decoder's forward, however they were passed."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.input_ids: torch.Tensor | None = arguments.get("input_ids")
        self.embeds: torch.Tensor | None = arguments.get("inputs_embeds")
        self.cache = arguments.get("past_key_values")
        self.use_cache: bool | None = arguments.get("use_cache")
        self.position_ids: torch.Tensor | None = arguments.get("position_ids")
        self.attention_mask = arguments.get("attention_mask")
        self.outer_ids: torch.Tensor | None = None

    @classmethod
    def of(cls, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        names = list(inspect.signature(decoder.forward).parameters) if args else []
        return cls({**dict(zip(names, args, strict=False)), **kwargs})

    def within(self, outer: _Call | None) -> _Call:
        """The call with what the model around the decoder was called with, where the decoder was given less."""
        if outer is None or outer.input_ids is None or outer.input_ids.shape != self.shape:
            return self
        self.outer_ids = outer.input_ids
        if isinstance(self.attention_mask, Mapping):
            self.attention_mask = outer.attention_mask
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Batch size and query length."""
        tokens = self.input_ids if self.input_ids is not None else self.embeds
        if tokens is None:
            raise InvalidArgumentError("expected input_ids or inputs_embeds, got neither")
        return tokens.shape[0], tokens.shape[1]

    @property
    def query_length(self) -> int:
        return self.shape[1]

    @property
    def n_seen(self) -> int:
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def is_prefill(self) -> bool:
        return self.n_seen == 0 or self.query_length > 1

    def valid(self) -> torch.Tensor:
        """Bool ``[batch, query_length]``, False at padding.

        Raises:
            InvalidArgumentError: A mask that is not 2-D, or whose padding is not at one end (or both) of a row.
        """
        batch, length = self.shape
        mask = self.attention_mask
        if mask is None:
            tokens = self.input_ids if self.input_ids is not None else self.embeds
            assert tokens is not None
            return torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
            raise InvalidArgumentError(f"expected a 2-D attention mask [batch, tokens] under a press, got {shape}")
        valid = mask[:, -length:].bool()
        runs = (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1) + valid[:, 0]
        if bool((runs > 1).any()):
            raise InvalidArgumentError("expected padding at the ends of a row only, got an attention mask with holes")
        if not bool(valid.any(dim=1).all()):
            raise InvalidArgumentError("expected at least one token in every row, got a row of padding only")
        return valid

    def positions(self, start: int, valid: torch.Tensor) -> torch.Tensor:
        """int32 ``[batch, query_length]``, the position of each token in its row.

        Raises:
            InvalidArgumentError: Tokens with several positions that differ (M-RoPE: images and video).
        """
        positions = self.position_ids
        if positions is None:
            positions = start + torch.arange(self.query_length, device=valid.device)[None]
        if positions.dim() == 3 and bool((positions == positions[:1]).all()):
            positions = positions[0]  # text alone has the same position on every axis
        if positions.dim() != 2:
            raise InvalidArgumentError(
                f"expected one position a token under a press, got position_ids {tuple(positions.shape)} that differ "
                "along the first dimension (M-RoPE): images and video cannot be compressed with such a model"
            )
        return positions.expand(valid.shape[0], -1).int()

    def _ids_read(self, model: Any) -> torch.Tensor | None:
        """The token ids that were read; None where there are none, as for images: their ids are placeholders."""
        if self.input_ids is not None or self.outer_ids is None:
            return self.input_ids
        embeds = model.get_input_embeddings()(self.outer_ids)
        same = self.embeds is not None and torch.equal(embeds, self.embeds.to(embeds.device))
        return self.outer_ids if same else None

    def prefill(self, model: nn.Module, cache: Any, start: int, observers: dict[Press, Any]) -> Prefill:
        """What was just read, as presses see it."""
        valid = self.valid()
        positions = self.positions(start, valid)
        return Prefill(model, cache, self._ids_read(model), valid, positions, start=start, observers=observers)
