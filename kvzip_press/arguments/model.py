"""A model and its tokenizer, the first two arguments of most functions: told apart before anything is computed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import nn

from kvzip_press.errors import InvalidArgumentError

P = ParamSpec("P")
R = TypeVar("R")
_MISSING = object()


def takes_model(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function check its first argument as a model, and its second as a tokenizer if it is named so.

    A forgotten tokenizer moves all that follow it by one place, and Python would only say that the last is missing.
    """
    names = list(inspect.signature(function).parameters)
    call = f"{function.__name__}({', '.join(names[: 4 if 'tokenizer' in names else 3])}, ...)"

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for place, (name, check) in enumerate(_CHECKS.items()):
            given = kwargs.get(name, _MISSING) if len(args) <= place else args[place]
            if name == names[place] and given is not _MISSING:
                check(given, call)
        return function(*args, **kwargs)

    return checked


def check_model(given: object, call: str) -> None:
    """Raises InvalidArgumentError unless this is a model; ``call`` is how the function is called."""
    if isinstance(given, nn.Module):
        return
    hint = ""
    if isinstance(given, str):
        hint = f": load it first, model, tokenizer = load_model({given!r:.80})"
    elif isinstance(given, tuple):
        hint = ": unpack what load_model returned, model, tokenizer = load_model(...)"
    raise InvalidArgumentError(f"{call}: expected a model, got {_described(given)}{hint}")


def check_tokenizer(given: object, call: str) -> None:
    """Raises InvalidArgumentError unless this is a tokenizer; ``call`` is how the function is called."""
    if all(callable(getattr(given, name, None)) for name in ("encode", "decode")):
        return
    hint = ""
    if given is None:
        hint = ": load_model returns a model's tokenizer beside it"
    elif isinstance(given, str):
        hint = ", a text: was the tokenizer forgotten?"
    elif hasattr(given, "tokenizer"):
        hint = ": pass processor.tokenizer"
    raise InvalidArgumentError(f"{call}: expected a tokenizer, got {_described(given)}{hint}")


def _described(given: object) -> str:
    return "None" if given is None else type(given).__name__


_CHECKS = {"model": check_model, "tokenizer": check_tokenizer}
