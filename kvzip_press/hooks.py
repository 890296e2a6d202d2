"""``with press(model):`` - two hooks on the decoder that compress the cache when a prefill forward ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press.attention import attach, detach, is_attached
from kvzip_press.errors import InvalidArgumentError, KVzipPressError, UnsupportedCacheError
from kvzip_press.eviction import check_cache
from kvzip_press.models import full_attention_layers, text_decoder
from kvzip_press.prefilling import Prefill
from kvzip_press.press import Press

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def compressing(press: Press, model: nn.Module) -> Iterator[None]:
    """The context manager behind ``with press(model):``.

    A forward over an empty cache, or over more than one token, is a prefill: when it ends, the new tokens' pairs are
    compressed in place. The model stays attached afterwards, so that the cache can be used; an error undoes that too.
    """
    full_attention_layers(model)
    decoder = text_decoder(model)
    hooks = decoder._forward_hooks.values()  # noqa: SLF001  # torch has no public name for them
    if any(isinstance(getattr(hook, "__self__", None), _Session) for hook in hooks):
        raise KVzipPressError("expected one press at a time: the model is already inside `with press(model):`")
    was_attached = is_attached(model)
    with ExitStack() as stack:
        session = _Session(press, model)
        attach(model)
        stack.callback(session.close)
        stack.callback(decoder.register_forward_pre_hook(session.before, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(session.after, with_kwargs=True).remove)
        try:
            yield
        except BaseException:
            if not was_attached:
                detach(model)
            raise


class _Session:
    """The state of one ``with press(model):``; it ends with the context."""

    def __init__(self, press: Press, model: nn.Module) -> None:
        self.press, self.model = press, model
        self.busy = False  # scoring runs forwards of its own
        self.start = 0
        self.observing: ExitStack | None = None
        self.observers: dict[Press, Any] = {}

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what cannot be compressed before anything is computed, and lets the press watch."""
        if self.busy:
            return
        self.close()
        call = _Call.of(decoder, args, kwargs)
        if call.use_cache is False:
            raise UnsupportedCacheError("expected use_cache=True inside `with press(model):`, got use_cache=False")
        if call.cache is not None:
            check_cache(call.cache)
        self.start = call.n_seen
        if not call.is_prefill:
            return
        call.valid()
        observer = self.press.observer(self.model)
        if observer is not None:
            self.observing = ExitStack()
            self.observing.enter_context(observer)
            self.observers = {self.press: observer}

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compresses the span that was just read."""
        if self.busy:
            return
        observers, start = self.observers, self.start
        self.close()
        call = _Call.of(decoder, args, kwargs)
        if not (start == 0 or call.query_length > 1):
            return
        self.busy = True
        try:
            with torch.no_grad():
                prefill = call.prefill(self.model, output.past_key_values, start, observers)
                prefill.evict_in_place(self.press.score(prefill))
        finally:
            self.busy = False

    def close(self) -> None:
        """Stops watching (also after a forward that raised)."""
        if self.observing is not None:
            self.observing.close()
        self.observing, self.observers = None, {}


class _Call:
    """The arguments of a decoder's forward, however they were passed."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.input_ids: torch.Tensor | None = arguments.get("input_ids")
        self.embeds: torch.Tensor | None = arguments.get("inputs_embeds")
        self.cache = arguments.get("past_key_values")
        self.use_cache: bool | None = arguments.get("use_cache")
        self.position_ids: torch.Tensor | None = arguments.get("position_ids")
        self.attention_mask = arguments.get("attention_mask")

    @classmethod
    def of(cls, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        names = list(inspect.signature(decoder.forward).parameters) if args else []
        return cls({**dict(zip(names, args, strict=False)), **kwargs})

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

    def prefill(self, model: nn.Module, cache: Any, start: int, observers: dict[Press, Any]) -> Prefill:
        """What was just read, as presses see it."""
        valid = self.valid()
        positions = self.position_ids
        if positions is None:
            positions = start + torch.arange(self.query_length, device=valid.device)[None]
        positions = positions.expand(valid.shape[0], -1).int()
        return Prefill(model, cache, self.input_ids, valid, positions, start=start, observers=observers)
