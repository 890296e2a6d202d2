"""The one place that knows how transformers differs between versions (4.56 to the newest).

The differences that matter here:

- up to 5.3 a cache layer is asked ``get_mask_sizes(cache_position)``, from 5.4 on ``get_mask_sizes(query_length)``;
- ``Cache.crop(n)`` took the length to keep (or minus the number to drop); from 5.2x on only the latter;
- the flash-attention integration reads the name of the implementation back from the module's config.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

__all__ = [
    "TRANSFORMERS_VERSION",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "attention_function",
    "attention_overridden",
    "is_kvpress_wrapper",
    "length_after_crop",
    "mask_function",
    "query_length_of",
    "register_attention",
]

TRANSFORMERS_VERSION = Version(transformers.__version__)


def query_length_of(argument: int | torch.Tensor) -> int:
    """The query length behind the argument of ``get_mask_sizes``: itself, or the number of cache positions."""
    return argument.shape[0] if isinstance(argument, torch.Tensor) else int(argument)


def length_after_crop(argument: int, n_seen: int) -> int:
    """The tokens left after ``crop(argument)``: a negative argument drops that many, a positive one keeps that many.

    Zero drops nothing, which is what the newest transformers means; older ones never call it so.
    """
    return n_seen + argument if argument <= 0 else min(argument, n_seen)


def attention_function(name: str) -> Callable[..., Any] | None:
    """The attention function registered as ``name``; None for "eager", which every modelling file defines itself."""
    return None if name == "eager" else _working(ALL_ATTENTION_FUNCTIONS[name])


def is_kvpress_wrapper(function: Callable[..., Any]) -> bool:
    """Whether an attention function is kvpress's wrapper around another, which hides the keys that kvpress masked."""
    return getattr(function, "__module__", None) == "kvpress.attention_patch"


def _working(function: Callable[..., Any]) -> Callable[..., Any]:
    """Steps over a wrapper that breaks what it wraps.

    Importing kvpress wraps every attention function in one that hands ``dropout`` on as the sixth argument, where
    flex_attention takes its scaling. Functions that do take dropout there stay wrapped, as kvpress's presses need it.
    """
    if not is_kvpress_wrapper(function):
        return function
    wrapped: Callable[..., Any] = inspect.getclosurevars(function).nonlocals["func"]
    return function if list(inspect.signature(wrapped).parameters)[5] == "dropout" else wrapped


def mask_function(name: str) -> Callable[..., Any] | None:
    """The function that builds the mask for attention implementation ``name``; None when it takes no mask."""
    return _flex_mask if name == "flex_attention" else ALL_MASK_ATTENTION_FUNCTIONS.get(name, None)


def _flex_mask(*args: Any, **kwargs: Any) -> Any:
    """flex_attention's block mask, but a plain one for a ragged layer, which no flex kernel will see.

    Only ragged layers have full attention over keys that begin at an offset. Compiling a block mask for them would
    cost seconds, and torch's CPU backend cannot (padded keys at an offset: invalid C++, torch 2.13).
    """
    if kwargs.get("kv_offset", 0) and kwargs.get("local_size") is None:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"](*args, **kwargs)


@contextmanager
def attention_overridden(name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """While open, ``name`` stands for another attention function."""
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def mask_overridden(name: str, mask: Callable[..., Any]) -> Iterator[None]:
    """While open, ``name`` stands for another mask function."""
    ALL_MASK_ATTENTION_FUNCTIONS[name] = mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[name]


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any] | None) -> None:
    """Adds an attention implementation (and its mask) under a new name; nothing that exists is replaced."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return
    AttentionInterface.register(name, attention)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
