"""kvpress presses that do not evict pairs at the end of a prefill, or not only that."""

from __future__ import annotations

from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.kvpress_adapter.module_state import presses_in

_WHILE_DECODING = "it evicts while tokens are generated, and the adapter compresses when a prefill ends"

#: Class name -> what it does that is not eviction. Subclasses are refused with them.
REFUSED = {
    "ThinKPress": "it zeroes channels of the keys, which frees no pair",
    "MergingPress": "it merges evicted values into kept ones; wrap its inner press to evict without merging",
    "CAMPress": f"it merges values, and {_WHILE_DECODING}",
    "KeyRerotationPress": "it moves keys to new positions, and a ragged cache keeps the original ones; wrap its press",
    "FinchPress": "it takes a token out of the prompt and moves keys to new positions, and a ragged cache keeps both",
    "DecodingPress": _WHILE_DECODING,
    "PrefillDecodingPress": f"{_WHILE_DECODING}; wrap its prefilling_press",
    "RestoreKVPress": "it adds learned pairs to the cache that no token of the context has",
}


def check_supported(press: Any, base: Any) -> None:
    """Raises InvalidArgumentError for a press that is refused, or one inside it.

    Args:
        press: A kvpress press.
        base: kvpress's BasePress.
    """
    for inner in presses_in(press):
        name = type(inner).__name__
        for ancestor in type(inner).__mro__:
            if ancestor.__name__ in REFUSED:
                raise InvalidArgumentError(f"{name} cannot be made real: {REFUSED[ancestor.__name__]}")
        if getattr(inner, "decoding", False):
            raise InvalidArgumentError(f"{name}(decoding=True) cannot be made real: {_WHILE_DECODING}")
        if inner is not press and type(inner).__call__ is not base.__call__:
            raise InvalidArgumentError(
                f"{name} inside {type(press).__name__} would do nothing: it acts in its own context, never entered"
            )
