"""Presses by name: the table of those that come with the package, and those that users register."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvzip_press.errors import InvalidArgumentError, did_you_mean

#: What makes a press: a callable, or ``"package.module:callable"``, which is imported when it is asked for.
Target = str | Callable[..., Any]


@dataclass(frozen=True)
class PressInfo:
    """One line about a press.

    Attributes:
        name: Its name.
        target: What makes it: ``"package.module:callable"`` or a callable, called with ``compression_ratio`` and
            options.
        summary: What it keeps, or how it scores.
        paper: arXiv number of the paper; empty for none.
        needs: What it needs for a model besides the model's own weights and tokenizer; empty for nothing.
        needs_kvpress: Whether the package kvpress must be installed.
        takes_ratio: Whether a compression ratio means something to it; False for the press that removes nothing and
            for those that take a budget only.
    """

    name: str
    target: Target
    summary: str = ""
    paper: str = ""
    needs: str = ""
    needs_kvpress: bool = False
    takes_ratio: bool = True


_registered: dict[str, PressInfo] = {}


def table() -> dict[str, PressInfo]:
    """Returns all presses by name: those of the package, then those of the user."""
    from kvzip_press.presses import PRESSES

    return {**{info.name: info for info in PRESSES}, **_registered}


def register(info: PressInfo) -> None:
    """Adds a press of the user to the table."""
    _registered[info.name] = info


def find(name: str) -> PressInfo:
    """Returns the entry of a name.

    Raises:
        InvalidArgumentError: The name is unknown; the message suggests the nearest one.
    """
    known = table()
    if name not in known:
        raise InvalidArgumentError(unknown(name, known))
    return known[name]


def unknown(name: str, known: Iterable[str]) -> str:
    """Returns the message about a name that no press has."""
    if len(name) > 80 or name.count(" ") > 1:
        return (
            f"expected a press, got a text of {len(name)} letters, {name!r:.40}: the context comes before the press, "
            "compress(model, tokenizer, context, press)"
        )
    meant = did_you_mean(name, known)
    among = "those that presses_table() lists" if meant else ", ".join(sorted(known))
    return f"expected a press among {among}, got {name!r:.80}{meant}"


def resolved(target: Target) -> Any:
    """Returns the callable that a target names, and imports its module if need be."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def made(name: str, compression_ratio: float, **options: Any) -> Any:
    """Makes the press of a name, and refuses what is none.

    Raises:
        InvalidArgumentError: The name or an option is unknown, a value is refused, or what is registered makes no
            press.
        MissingDependencyError: The press needs a package that is missing.
    """
    target = resolved(find(name).target)
    _check_options(name, target, options)
    press = target(compression_ratio=compression_ratio, **options)
    if not is_press(press):
        raise InvalidArgumentError(
            f"expected {name!r} to make a press, an object with the methods `score` and `observer`, got "
            f"{type(press).__name__}"
        )
    return press


def check_options(name: str, options: Iterable[str]) -> None:
    """Raises InvalidArgumentError if the press of a name takes no option of one of these names.

    Raises:
        MissingDependencyError: The press needs a package that is missing.
    """
    _check_options(name, resolved(find(name).target), options)


def _check_options(name: str, target: Callable[..., Any], options: Iterable[str]) -> None:
    """Raises InvalidArgumentError if the target takes no option of a name; one that takes any checks them itself."""
    parameters = inspect.signature(target).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    known = sorted(parameters.keys() - {"compression_ratio"})
    for option in options:
        if option not in parameters:
            raise InvalidArgumentError(
                f"expected options of {name!r} among {', '.join(known)}, got {option!r:.80}"
                f"{did_you_mean(option, known)}"
            )


def is_press(given: object) -> bool:
    """Whether an object, not a class, has what reading a context asks of a press."""
    methods = (getattr(given, name, None) for name in ("score", "observer"))
    return not isinstance(given, type) and all(map(callable, methods))
