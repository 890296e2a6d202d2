"""Checks options that a user gives by name or number, with one message for unknown names and one for numbers."""

from collections.abc import Iterable

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
            f"expected {kind} out of {', '.join(names)}, got {given!r}{did_you_mean(given, names)}"
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
