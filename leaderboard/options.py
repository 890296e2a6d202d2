"""Checks options that a user gives by name or number, with one message for unknown names, one for numbers and one for kinds."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvzip_press.errors import InvalidArgumentError, did_you_mean


def check_name(kind: str, given: str, known: Iterable[str]) -> None:
    """Refuses a name that is not in ``known``; the message suggests the nearest one.

    Args:
        kind: What the name stands for, with its article, for the message: "a task".
        given: The name.
        known: All names that exist.

    Raises:
        InvalidArgumentError: The name is not in ``known``.
    """
    names = sorted(known)
    if given not in names:
        raise InvalidArgumentError(
            f"expected {kind} out of {', '.join(names)}, got {given!r:.80}{did_you_mean(given, names)}"
        )


def check_between(**limits: tuple[int, int, int | None]) -> None:
    """Refuses the first number that is outside its range.

    Args:
        limits: Name -> (the number, the smallest allowed, the largest allowed or None).

    Raises:
        InvalidArgumentError: A number is outside its range.
    """
    for name, (given, least, most) in limits.items():
        if given < least or (most is not None and given > most):
            wanted = f">= {least}" if most is None else f"in {least}..{most}"
            raise InvalidArgumentError(f"expected {name} {wanted}, got {given}")


def check_kinds(options: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Refuses the first option whose value is of another kind than its field; True and False are no integers.

    Args:
        options: Name -> value.
        kinds: Name -> the field's type: only those that are str, int or bool are checked.

    Raises:
        InvalidArgumentError: A value is of another kind.
    """
    words = {str: "a text", int: "an integer", bool: "true or false"}
    for name, value in options.items():
        kind = kinds.get(name)
        if kind in words and type(value) is not kind:
            raise InvalidArgumentError(f"expected {name} to be {words[kind]}, got {value!r:.80}")
