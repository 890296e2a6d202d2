"""Numbers that a user gives."""

from __future__ import annotations

from typing import TypeGuard

from kvzip_press.errors import InvalidArgumentError


def is_int(value: object) -> TypeGuard[int]:
    """Whether this is an integer of Python's; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(name: str, given: object, least: int = 1) -> int:
    """Returns a whole number, ``1e9`` too.

    Args:
        name: What the argument is called.
        given: What was given.
        least: The least that is allowed.

    Raises:
        InvalidArgumentError: It is none, or is too small.
    """
    if isinstance(given, int | float) and not isinstance(given, bool) and given == given // 1 and given >= least:
        return int(given)
    raise InvalidArgumentError(f"expected {name} as a whole number of {least} and more, got {given!r:.80}")
