"""The one place that knows how transformers differs between versions (4.56 to the newest).

The differences that matter here:

- up to 5.3 a cache layer is called with ``get_mask_sizes(cache_position)``, from 5.4 on with
``get_mask_sizes(query_length)``;
- ``Cache.crop(n)`` took the length to keep (or minus the number to drop); from 5.2x on it takes only the latter;
- the flash-attention integration reads the name of the implementation back from the module's config;
- up to 5.23 a model takes and returns its cache as ``past_key_values``, from 5.24 on as ``cache``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvzip_press.errors import UnsupportedModelError

__all__ = [
    "TESTED_TRANSFORMERS",
    "TRANSFORMERS_VERSION",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "attention_function",
    "cache_after",
    "cache_argument",
    "cache_given",
    "in_assisted_decoding",
    "is_kvpress_wrapper",
    "is_within",
    "length_after_crop",
    "mask_function",
    "query_length_of",
    "register_attention",
    "uncompiled",
    "warn_if_untested",
]

TRANSFORMERS_VERSION = Version(transformers.__version__)
TESTED_TRANSFORMERS = ("4.56.2", "5.24.0")
"""The oldest and the newest release that the tests run on.

``constraints/oldest.txt`` and ``constraints/newest.txt`` pin them; tests compare. The oldest is the floor in
``pyproject.toml``. The newest is no ceiling there: most releases change nothing that matters here, a ceiling would hold
back all else that shares an environment, and pip would answer it with an older kvzip-press, not with a newer one.
"""
# What forwards call their cache, the newest name first; a model of older code keeps the older one.
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value")
_CACHE_NAME = "cache" if Version("5.24") <= TRANSFORMERS_VERSION else "past_key_values"
logger = logging.getLogger(__name__)


def is_within(version: str, bounds: tuple[str, str]) -> bool:
    """Returns whether a version is the first of ``bounds`` or newer, and below the second."""
    release, first, end = (Version(one).release for one in (version, *bounds))
    return first <= release < end


@functools.cache
def warn_if_untested() -> None:
    """Warns, once a process, if this minor release of transformers is outside the range that is tested."""
    oldest, newest = TESTED_TRANSFORMERS
    if not Version(oldest).release[:2] <= TRANSFORMERS_VERSION.release[:2] <= Version(newest).release[:2]:
        logger.warning(
            "transformers %s is outside the range that kvzip-press is tested with, %s to %s: a difference that it "
            "recognises raises an error, others are not known. To be safe: pip install 'transformers>=%s,<=%s'",
            TRANSFORMERS_VERSION,
            *(oldest, newest) * 2,
        )


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among the named arguments of a forward; None if there is none.

    Raises:
        UnsupportedModelError: There is one under a name that no tested version of transformers uses.
    """
    found = _cache_in(arguments)
    strange = [name for name, value in arguments.items() if isinstance(value, Cache)] if found is None else []
    if strange:
        raise UnsupportedModelError(f"{_expected_cache()}, got it as `{strange[0]}`")
    return found


def _cache_in(named: Mapping[str, Any]) -> Any:
    return next((named[name] for name in _CACHE_NAMES if named.get(name) is not None), None)


def _expected_cache() -> str:
    return (
        "expected a forward that takes and returns its cache as `cache` or `past_key_values`, as in transformers "
        f"{' to '.join(TESTED_TRANSFORMERS)} (this is {TRANSFORMERS_VERSION})"
    )


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Returns ``cache`` under the name by which the model's forward takes it, as keyword arguments."""
    return {_cache_name(getattr(model.forward, "__func__", model.forward)): cache}


@functools.lru_cache(maxsize=64)
def _cache_name(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAME)


def cache_after(output: Any, given: Any = None) -> Any:
    """Returns the cache that a forward filled: that of its output, whatever its name and form, else the one ``given``.

    Raises:
        UnsupportedModelError: The output has no cache, and none was given.
    """
    fields = output if isinstance(output, Mapping) else {}
    candidates = output if isinstance(output, tuple) else (_cache_in(fields),)
    found = next((item for item in candidates if isinstance(item, Cache)), given)
    if found is None:
        raise UnsupportedModelError(
            f"{_expected_cache()}, got {type(output).__name__}{f' with {sorted(fields)}' if fields else ''}: pass the "
            "cache to the model"
        )
    return found


def query_length_of(argument: int | torch.Tensor) -> int:
    """Returns the query length from the argument of ``get_mask_sizes``: itself, or the number of cache positions."""
    return argument.shape[0] if isinstance(argument, torch.Tensor) else int(argument)


def length_after_crop(argument: int, n_seen: int) -> int:
    """Returns the tokens left after ``crop(argument)``: a negative argument drops, a positive one keeps that many.

    Zero drops nothing, as in the newest transformers; older versions never pass it.
    """
    return n_seen + argument if argument <= 0 else min(argument, n_seen)


def uncompiled(model: Any) -> AbstractContextManager[None]:
    """While open, a model that was compiled as a whole runs as it is written; any other is left alone.

    ``torch.compile`` traces what it can of a forward, which a ragged cache's views of memory are not.
    """
    compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")
    return _eager() if compiled or hasattr(model.forward, "_torchdynamo_orig_callable") else nullcontext()


_EAGER_LOCK = threading.Lock()
_EAGER: list[Any] = []  # one entry for each that is open in any thread; the first holds the stance


@contextmanager
def _eager() -> Iterator[None]:
    """While open in any thread, nothing is compiled: the stance is the process's, so the last to leave ends it."""
    with _EAGER_LOCK:
        _EAGER.append(None if _EAGER else torch.compiler.set_stance("force_eager"))  # it holds from here on
    try:
        yield
    finally:
        with _EAGER_LOCK:
            if len(_EAGER) > 1:
                _EAGER.pop()
            else:
                _EAGER.pop().__exit__(None, None, None)


def attention_function(name: str, device: torch.device) -> Callable[..., Any] | None:
    """Returns the attention function registered as ``name``.

    None for "eager", which every modelling file defines itself, and for flex_attention on a CPU, where eager takes its
    place: what torch compiles it to there (torch 2.13) reads memory behind the keys if their number is no multiple of
    16, and some tokens' outputs are zero or NaN, depending on what lay there.
    """
    eager = name == "eager" or (name == "flex_attention" and device.type == "cpu")
    return None if eager else _working(ALL_ATTENTION_FUNCTIONS[name])


def in_assisted_decoding() -> bool:
    """Returns whether transformers' assisted decoding (prompt look-up, too) called the running function.

    Nothing that a forward is given tells so: its candidates look like a user's next turn.
    """
    code = getattr(getattr(GenerationMixin, "_assisted_decoding", None), "__code__", None)
    frame = sys._getframe()  # noqa: SLF001  # documented under this name
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def is_kvpress_wrapper(function: Callable[..., Any]) -> bool:
    """Returns whether an attention function is kvpress's wrapper, which hides the keys that kvpress masked."""
    return getattr(function, "__module__", None) == "kvpress.attention_patch"


def _working(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function itself, or what it wraps if it is a wrapper that breaks that.

    Importing kvpress wraps every attention function in one that passes ``dropout`` as the sixth argument, where
    flex_attention takes its scaling. Functions that do take dropout there stay wrapped, as kvpress's presses need it.
    """
    if not is_kvpress_wrapper(function):
        return function
    wrapped: Callable[..., Any] = inspect.getclosurevars(function).nonlocals["func"]
    return function if list(inspect.signature(wrapped).parameters)[5] == "dropout" else wrapped


def mask_function(name: str) -> Callable[..., Any] | None:
    """Returns the function that builds the mask for attention implementation ``name``; None if it takes no mask."""
    return _flex_mask if name == "flex_attention" else ALL_MASK_ATTENTION_FUNCTIONS.get(name, None)


def _flex_mask(*args: Any, **kwargs: Any) -> Any:
    """Builds flex_attention's block mask, but plain ones where no flex kernel will see them.

    On a CPU that is everywhere (:func:`attention_function`). Elsewhere it is in ragged layers, as only these have full
    attention over keys that begin at an offset: compiling a block mask for them would cost seconds.
    """
    device = kwargs["device"] if "device" in kwargs else kwargs["cache_position"].device
    if torch.device(device).type == "cpu":
        return ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **kwargs)
    if kwargs.get("kv_offset", 0) and kwargs.get("local_size") is None:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"](*args, **kwargs)


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any] | None) -> None:
    """Adds an attention implementation (and its mask) under a new name; nothing that exists is replaced."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return
    if mask is not None:  # first: another thread that finds the attention expects its mask
        AttentionMaskInterface.register(name, mask)
    AttentionInterface.register(name, attention)
