"""Which presses of kvpress are refused, and which errors mean that a press refuses a model or an input."""

from __future__ import annotations

import re
from typing import Any

from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.presses.kvpress_adapter.copies import presses_in

_WHILE_DECODING = "it evicts while tokens are generated, and the adapter compresses when a prefill ends"

#: Class name -> what it does that is not eviction. Subclasses are refused, too.
REFUSED = {
    "ThinKPress": "it zeroes channels of the keys, which frees no pair",
    "MergingPress": "it merges evicted values into kept ones; wrap its inner press to evict without merging",
    "CAMPress": f"it merges values, and {_WHILE_DECODING}",
    "KeyRerotationPress": "it moves keys to new positions, and a ragged cache keeps the original ones; wrap its press",
    "FinchPress": "it takes a token out of the prompt and moves keys to new positions, and a ragged cache keeps both",
    "RestoreKVPress": "it adds learned pairs to the cache that no token of the context has",
}


#: Base presses of a DecodingPress, by class name -> why their scores cannot be had while the model writes.
_NOT_A_BASE = {
    "AdaKVPress": "it lets heads keep different numbers of pairs, and scores heads of one length only: kvpress itself "
    "only masks pairs there, which frees none; a press of ours has allocation='adakv'",
    "ObservedAttentionPress": "it needs the attention of every query, which is not kept; H2OPress is the same, real",
}

#: What presses raise for a model or an input that they do not take (OSError: tokenizer or weights cannot be loaded).
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)

#: Presses that can score a span of tokens by itself, after a context that was already evicted: they look at the
#: span's own keys, values, hidden states and position embeddings. Others expect the beginning of a sequence: Expected
#: Attention counts positions from 0, StreamingLLM keeps the first tokens that it is given.
_ANY_SPAN = {"KeyDiffPress", "KnormPress", "SnapKVPress", "TOVAPress"}


def check_supported(press: Any, base: Any) -> None:
    """Raises InvalidArgumentError if a press, or one inside it, cannot be wrapped.

    Args:
        press: A kvpress press.
        base: kvpress's BasePress.
    """
    for decoding in filter(None, [decoding_press_in(press)]):
        _check_base(decoding.base_press)
    for inner in presses_in(press):
        name = type(inner).__name__
        for ancestor in type(inner).__mro__:
            if ancestor.__name__ in REFUSED:
                raise InvalidArgumentError(f"{name} cannot be made real: {REFUSED[ancestor.__name__]}")
        if getattr(inner, "decoding", False):
            raise InvalidArgumentError(f"{name}(decoding=True) cannot be made real: {_WHILE_DECODING}")
        if inner is not press and type(inner).__call__ is not base.__call__ and not _acts_while_decoding(press):
            raise InvalidArgumentError(
                f"{name} inside {type(press).__name__} would do nothing: it acts in its own context, never entered"
            )


def decoding_press_in(press: Any) -> Any:
    """Returns kvpress's DecodingPress that a press is or has for what the model writes; None if there is none."""
    if _is_a(press, "PrefillDecodingPress"):
        return press.decoding_press
    return press if _is_a(press, "DecodingPress") else None


def prefilling_press_in(press: Any) -> Any:
    """Returns what a press of kvpress does to a prompt: itself, a press inside it, or None for nothing."""
    if _is_a(press, "PrefillDecodingPress"):
        return press.prefilling_press
    return None if _is_a(press, "DecodingPress") else press


def _acts_while_decoding(press: Any) -> bool:
    return _is_a(press, "DecodingPress") or _is_a(press, "PrefillDecodingPress")


def _is_a(press: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(press).__mro__)


def _check_base(base: Any) -> None:
    """Raises InvalidArgumentError if a base press cannot score what is in the cache while the model writes."""
    name = type(base).__name__
    why = next((_NOT_A_BASE[cls.__name__] for cls in type(base).__mro__ if cls.__name__ in _NOT_A_BASE), None)
    if why is None and getattr(type(base), "compress", None) is not _scorer_compress(base):
        why = "it does not only score, and what it keeps of a cache that grows cannot be told from its scores"
    if why is not None:
        raise InvalidArgumentError(f"{name} inside a DecodingPress cannot be made real: {why}")


def _scorer_compress(base: Any) -> Any:
    return next((vars(cls)["compress"] for cls in type(base).__mro__ if cls.__name__ == "ScorerPress"), None)


# What torch says, in a RuntimeError, where a press's arithmetic does not fit what it is given: the empty tensors that a
# few tokens leave it with, heads of which RoPE turns a part only, a dtype that it was not written for.
_DOES_NOT_FIT = re.compile(
    r"numel\(\) == 0|of 0 elements|must match the size of tensor|cannot be converted to type"
    r"|shapes cannot be multiplied"
)
_FEW = 64  # tokens; of so short a context the length is said


def as_ours(press: str, error: Exception, where: str = "", n_tokens: int | None = None) -> Exception:
    """Returns a refusal of kvpress's own as an error of ours, with its message; any other error as it is.

    Args:
        press: What the press is called.
        error: What it raised.
        where: Where it did, with a space before it.
        n_tokens: The length of what it read, if that may be too short for it.
    """
    does_not_fit = type(error) is RuntimeError and _DOES_NOT_FIT.search(str(error))
    if isinstance(error, KVzipPressError) or not (isinstance(error, REFUSALS) or does_not_fit):
        return error
    is_short = n_tokens is not None and n_tokens < _FEW
    length = f", of {n_tokens} token{'s' if n_tokens != 1 else ''}" if is_short else ""
    return InvalidArgumentError(f"{press} refused{where}{length}: {type(error).__name__}: {error}")


def later_turn(press: str, seen: int) -> str:
    """Returns the message that says why a kvpress press does not continue where a cache ends."""
    return (
        f"{press} compresses a context that is read in one forward into an empty cache, but this cache has seen "
        f"{seen} tokens: end `with press(model):` before the next turn (the compressed cache goes on without it)"
    )


def scores_any_span(press: Any) -> bool:
    """Returns whether a kvpress press can score any span of tokens."""
    return type(press).__name__ in _ANY_SPAN and type(press).__module__.startswith("kvpress.")
