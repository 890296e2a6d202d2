"""Presses by name, as commands, grids and the leaderboard use them. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from kvzip_press.errors import InvalidArgumentError, did_you_mean
from kvzip_press.press import Press

_registered: dict[str, str] = {}


def register_press(name: str, target: str) -> None:
    """Registers a press of your own under a name.

    Args:
        name: The name, which must not be taken yet.
        target: ``"package.module:Callable"``, called with ``compression_ratio`` and options, returning a Press.

    Raises:
        InvalidArgumentError: A press of that name exists.
    """
    if name in press_names():
        raise InvalidArgumentError(f"expected a new name, but a press named {name!r} exists")
    _registered[name] = target


def press_names() -> list[str]:
    """Returns all names, sorted."""
    return sorted(_table())


def get_press(name: str, compression_ratio: float = 0.0, **options: Any) -> Press:
    """Makes a press by its name.

    Args:
        name: One of :func:`press_names`.
        compression_ratio: Fraction of pairs removed, in [0, 1).
        options: Further arguments of that press.

    Raises:
        InvalidArgumentError: The name is unknown (the message suggests the nearest one), or a value is refused.
        MissingDependencyError: The press needs a package that is missing.
    """
    table = _table()
    if name not in table:
        hint = did_you_mean(name, table)
        raise InvalidArgumentError(f"expected a press among {', '.join(sorted(table))}, got {name!r}{hint}")
    module, _, attribute = table[name].partition(":")
    press = getattr(importlib.import_module(module), attribute)(compression_ratio=compression_ratio, **options)
    assert isinstance(press, Press)
    return press


def _table() -> dict[str, str]:
    builtin: dict[str, str] = importlib.import_module("kvzip_press.presses").PRESSES
    return {**builtin, **_registered}
