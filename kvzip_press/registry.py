"""Presses by name, as commands, grids and the leaderboard use them. Nothing is imported before it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from kvzip_press.arguments.named import PressInfo, made, register, table
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.press import Press


def register_press(name: str, target: str | Callable[..., Press], summary: str = "") -> None:
    """Registers a press of your own under a name.

    Args:
        name: The name, which must not be taken yet.
        target: The class, or a function; or ``"package.module:Callable"``, which is imported when the press is asked
            for. It is called with ``compression_ratio`` and options, and returns a Press.
        summary: One line for the list of presses; by default the first line of the class's or function's docstring.

    Raises:
        InvalidArgumentError: A press of that name exists, or the target is neither a callable nor such a text.
    """
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"expected a name, then what makes the press, got {name!r:.80} as the name")
    if name in table():
        raise InvalidArgumentError(f"expected a new name, but a press named {name!r} exists")
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        is_one = bool(module and attribute)
    else:
        is_one = callable(target) and not isinstance(target, Press)
        summary = summary or (inspect.getdoc(target) or "").partition("\n")[0]
    if not is_one:
        raise InvalidArgumentError(
            f"expected a class or function that makes the press, or 'package.module:Callable', got {target!r:.80}"
        )
    register(PressInfo(name, target, summary))


def press_names() -> list[str]:
    """Returns all names, sorted."""
    return sorted(table())


def presses_table() -> list[PressInfo]:
    """Returns a line about each press that has a name, sorted by name; nothing is imported or loaded for it.

    Returns:
        Objects with ``name``, ``summary`` (what the press keeps, or how it scores), ``paper`` (its arXiv number),
        ``needs`` (besides the model's own weights and tokenizer), ``needs_kvpress``, ``takes_ratio`` and ``target``.
    """
    return [info for _, info in sorted(table().items())]


def get_press(name: str, compression_ratio: float = 0.0, **options: Any) -> Press:
    """Makes a press by its name.

    Args:
        name: One of those that :func:`kvzip_press.presses_table` lists.
        compression_ratio: Fraction of pairs removed, in [0, 1).
        options: Further arguments of that press.

    Raises:
        InvalidArgumentError: The name is unknown (the message suggests the nearest one), or a value is refused.
        MissingDependencyError: The press needs a package that is missing.
    """
    press = made(name, compression_ratio, **options)
    if not isinstance(press, Press):
        raise InvalidArgumentError(f"expected {name!r} to make a Press, got {type(press).__name__}")
    return press
