"""Options that a user gives by name or number: one message for those that do not exist or are out of range."""

from collections.abc import Iterable

from kvzip_press.errors import InvalidArgumentError, did_you_mean


def check_name(kind: str, given: str, known: Iterable[str]) -> None:
    """Refuses a name that is none of ``known``, with the nearest of them.

    Args:
        kind: What the name is of, with its article, for the message: "a task".
        given: The name.
        known: All there are.

    Raises:
        InvalidArgumentError: It is none of them.
    """
    names = sorted(known)
    if given not in names:
        raise InvalidArgumentError(
            f"expected {kind} out of {', '.join(names)}, got {given!r}{did_you_mean(given, names)}"
        )


def check_between(**limits: tuple[int, int, int | None]) -> None:
    """Refuses the first number that is outside its range.

    Args:
        limits: Name -> (the number, the least, the most or None).

    Raises:
        InvalidArgumentError: A number is outside its range.
    """
    for name, (given, least, most) in limits.items():
        if given < least or (most is not None and given > most):
            wanted = f">= {least}" if most is None else f"in {least}..{most}"
            raise InvalidArgumentError(f"expected {name} {wanted}, got {given}")
