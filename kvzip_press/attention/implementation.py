"""Makes a model attend to ragged caches, through an attention implementation registered under a name of its own.

``attach(model)`` renames the implementation of the model's attention config from ``sdpa`` to ``ragged|sdpa`` (the same
for eager, flash_attention_2, flex_attention ...). The function behind that name lets this package's cache layers attend
themselves (``attend``) and passes every other call to the implementation that the model had before, so an attached
model computes exactly what it did (but for flex_attention on a CPU: ``compat.attention_function``). A ragged layer's
``update`` returns :class:`CacheView` tensors that refuse every operation: an attention function that does not know them
raises an error instead of answering from a part of the cache.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.queries import of_layers, show_query
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError, UnsupportedModelError
from kvzip_press.model.structure import AttentionLayer, attention_layers, text_decoder
from kvzip_press.model.twin import twin_of

PREFIX = "ragged|"
# Arguments of attention functions that would change the result and that ragged attention does not implement.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices")
# Each is set for the forward that is running in this thread only. The first see attention calls.
_WATCHES: ContextVar[tuple[Callable[..., None], ...]] = ContextVar("kvzip_press_watches", default=())
_READ: ContextVar[torch.Tensor | None] = ContextVar("kvzip_press_read", default=None)  # which columns are tokens
_NO_MASKS: ContextVar[bool] = ContextVar("kvzip_press_no_masks", default=False)  # whether masks are left out
# The threads that attached a decoder, for those that undo it.
_ATTACHED_BY: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


class AttendingLayer(Protocol):
    """A cache layer that computes attention over its own storage."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Returns attention for ``query`` ``[batch, num_attention_heads, query_length, head_dim]``, in that layout."""


class AttentionWatch(Protocol):
    """Receives the arguments and the output of each call of a model's own attention, in layers that are compressed."""

    def __call__(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Inspects one call; the arguments are those of the attention interface."""


class CacheView(torch.Tensor):
    """A tensor returned by an attending layer's ``update``: it has a shape and a dtype, but refuses every operation."""

    layer: AttendingLayer

    @classmethod
    def of(cls, layer: AttendingLayer, tensor: torch.Tensor) -> CacheView:
        """Returns a view of ``tensor`` that refers back to ``layer``."""
        view = tensor.as_subclass(cls)
        view.layer = layer
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  # torch documents it under this name
                return func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # its tracer asks a tensor for more than attention does
            raise CacheMismatchError(
                "expected a forward over a compressed cache to run as it is written, got one that torch.compile "
                "traces: let kvzip_press.generate or answer call the model, or call it inside "
                "torch.compiler.set_stance('force_eager')"
            )
        name = getattr(func, "__name__", str(func))
        raise CacheMismatchError(
            f"a ragged KV cache was given to an attention function that does not know it (it called `{name}` on the "
            "keys or values). Use it with the model that made it, or call kvzip_press.attach(model) first; expected "
            f"an attention implementation named '{PREFIX}...'"
        )


_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.__repr__,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad")
    ),
}


def attach(model: nn.Module) -> bool:
    """Lets a model attend to ragged caches. Idempotent; :func:`detach` undoes it.

    Args:
        model: Any model with a decoder that uses transformers' attention interface.

    Returns:
        Whether anything had to be changed.

    Raises:
        UnsupportedModelError: The model has no such decoder.
    """
    compat.warn_if_untested()
    renamed = False
    _ATTACHED_BY.setdefault(text_decoder(model), set()).add(threading.get_ident())
    for config in _attention_configs(model):
        name = _implementation(config)
        if not name.startswith(PREFIX):
            _register(name)
            config._attn_implementation = PREFIX + name
            renamed = True
    return renamed


def detach(model: nn.Module) -> None:
    """Restores the model's own attention implementation; ragged caches then raise until it is attached again."""
    for config in _attention_configs(model):
        config._attn_implementation = _implementation(config).removeprefix(PREFIX)
    _ATTACHED_BY.pop(text_decoder(model), None)


def is_attached(model: nn.Module) -> bool:
    """Returns whether the model can currently attend to ragged caches."""
    return all(_implementation(config).startswith(PREFIX) for config in _attention_configs(model))


@contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """Attaches a model. An error inside undoes that, if neither it nor another thread had attached the model before."""
    was_attached = is_attached(model)
    attach(model)
    try:
        yield
    except BaseException:
        if not was_attached and _ATTACHED_BY.get(text_decoder(model)) == {threading.get_ident()}:
            detach(model)
        raise


@contextmanager
def masks_left_out() -> Iterator[None]:
    """While open, attached models build no masks in this thread.

    For caches whose layers all know by themselves what a query can see.
    """
    before = _NO_MASKS.get()
    _NO_MASKS.set(True)
    try:
        yield
    finally:
        _NO_MASKS.set(before)


@contextmanager
def attention_watched(model: nn.Module, watch: AttentionWatch, *, valid: torch.Tensor | None = None) -> Iterator[None]:
    """While open, ``watch`` sees every call of an attached model's own attention in this thread, as others do.

    Args:
        model: The model; of its layers those are shown that can be compressed.
        watch: Called after each call of attention.
        valid: ``[batch, columns]``, bool, False at padding, of all tokens in the cache after the forward, for whoever
            asks :func:`tokens_being_read` meanwhile; None leaves what is known.
    """
    before = _WATCHES.get(), _READ.get()
    _WATCHES.set((*before[0], of_layers(model, watch)))
    _READ.set(before[1] if valid is None else valid)
    try:
        yield
    finally:
        _WATCHES.set(before[0])  # not reset(token): a session whose forward raised may be closed in another context
        _READ.set(before[1])


def tokens_being_read() -> torch.Tensor | None:
    """Returns which columns are tokens in the forward that is watched, bool ``[batch, columns]``; None if not known."""
    return _READ.get()


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,  # wrappers around registered functions (kvpress's) pass it by position
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The registered attention function: lets this package's layers attend, and passes on all other calls.

    Other calls go to the model's own function. Arguments and return values are those of transformers' attention
    interface: query, key and value are ``[batch, heads, length, head_dim]``; the output is
    ``[batch, query_length, num_attention_heads, head_dim]``.

    Raises:
        UnsupportedModelError: An argument for a layer of this package is one that ragged attention does not implement.
        UnsupportedCacheError: A forward over a layer of this package records gradients.
    """
    kwargs["dropout"] = dropout
    show_query(module, query, kwargs)
    if not isinstance(key, CacheView):
        result = _own_attention(module, query, key, value, attention_mask, **kwargs)
        for watch in _WATCHES.get():
            watch(module, query, key, value, result[0], kwargs)
        return result
    refuse_unsupported(module, kwargs)
    refuse_gradients(query, key, value)
    softcap = softcap_of(module, kwargs)
    with torch.autocast(query.device.type, enabled=False):  # it would round what the kernels keep exact
        output = key.layer.attend(module, query, attention_mask, scaling=kwargs.get("scaling"), softcap=softcap)
    return output.transpose(1, 2).contiguous(), None


def refuse_gradients(*states: torch.Tensor) -> None:
    """Raises UnsupportedCacheError if one of the states of a forward over a compressed cache records gradients."""
    if any(one.requires_grad for one in states):
        raise UnsupportedCacheError(
            "expected a forward without gradients over a compressed cache, got one that records them: what a cache "
            "holds has no history, so gradients would be wrong. Call the model inside torch.no_grad(), or freeze it "
            "with model.requires_grad_(False)"
        )


def softcap_of(module: nn.Module, kwargs: dict[str, Any]) -> float | None:
    """Returns the softcap that an attached model's own attention applies; None if it applies none.

    A compressed cache has to compute what the model computed, and transformers' sdpa function ignores the softcap
    (Gemma 2).
    """
    return None if _implementation(module.config) == PREFIX + "sdpa" else kwargs.get("softcap")


def refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for arguments of an attention function that ragged attention does not implement."""
    given = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if kwargs.get("dropout"):
        given.append("dropout")
    if kwargs.get("is_causal") is False:
        given.append("is_causal=False")
    if given:
        raise UnsupportedModelError(f"{type(module).__name__} passes {', '.join(given)}, unknown to ragged attention")


def _own_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    name = _implementation(module.config).removeprefix(PREFIX)
    registered = compat.attention_function(name, args[0].device)
    function = registered or sys.modules[type(module).__module__].eager_attention_forward
    if getattr(module, "masked_key_indices", None) is not None and not compat.is_kvpress_wrapper(function):
        _refuse_kvpress_masks(module, name, *args[:2])
    if name.startswith("flash"):  # transformers' flash integration reads the name back from the config
        module = _under_its_own_name(module, name)
    return cast("tuple[torch.Tensor, torch.Tensor | None]", function(module, *args, **kwargs))


def _under_its_own_name(module: nn.Module, name: str) -> nn.Module:
    """Returns a twin whose config names the model's own implementation; the config itself is other threads', too."""
    twin = twin_of(module, only=())
    twin.config = copy.copy(module.config)
    twin.config._attn_implementation = name
    return cast("nn.Module", twin)


def _refuse_kvpress_masks(module: nn.Module, name: str, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises CacheMismatchError if kvpress masked keys that would stay visible here.

    Without RaggedPress, kvpress notes masked keys on the module, and only its own attention wrapper hides them.
    """
    if query.shape[2] != key.shape[2]:  # kvpress's own sign of a prefill, which clears the note
        raise CacheMismatchError(
            f"kvpress masked keys of {type(module).__name__} {module.layer_idx}, and {name} attention as it is called "
            "here would still see them: wrap the kvpress press in RaggedPress, or call kvzip_press.detach(model) and "
            "import kvpress before kvzip_press does"
        )


def _register(name: str) -> None:
    own = compat.mask_function(name)

    def masks(*args: Any, **kwargs: Any) -> Any:
        return None if own is None or _NO_MASKS.get() else own(*args, **kwargs)

    compat.register_attention(PREFIX + name, attention_forward, own and masks)


def _implementation(config: Any) -> str:
    return str(config._attn_implementation or "eager")


def _attention_configs(model: nn.Module) -> list[Any]:
    """Returns the configs that the decoder's masks and attention modules read, each once."""
    configs = [text_decoder(model).config, *(layer.module.config for layer in attention_layers(model))]
    return list({id(config): config for config in configs}.values())
