"""A press from whatever a caller hands in: a press, one of kvpress's, or the name of one."""

from __future__ import annotations

import sys
from numbers import Real
from typing import Any, Protocol

from kvzip_press.arguments.named import find, is_press, made, resolved
from kvzip_press.errors import InvalidArgumentError

_EXAMPLE = "KVzipPress(compression_ratio=0.7)"


class ForeignPress(Protocol):
    """A press of kvpress, told by its hook; it is wrapped in a RaggedPress."""

    @property
    def forward_hook(self) -> Any:
        """kvpress's hook on attention modules."""


def as_press(given: object, compression_ratio: float | None = None) -> Any:
    """Returns a press.

    A press of ours is returned as it is, and one of kvpress is wrapped in a :class:`kvzip_press.RaggedPress`, as it is
    at that moment. A name stands for the press that :func:`kvzip_press.get_press` makes of it, and needs a ratio: a
    name alone would remove nothing.

    Args:
        given: What the caller gave as a press.
        compression_ratio: The ratio for a name, in [0, 1). A press has its own.

    Raises:
        InvalidArgumentError: It is no press, a class, None, or an unknown name; a name comes without a ratio, or a
            press with one. The message says what to write instead.
        MissingDependencyError: The press needs a package that is missing.
    """
    if isinstance(given, str):
        return _of_name(given, compression_ratio)
    if compression_ratio is not None:
        raise InvalidArgumentError(
            f"expected a compression_ratio beside a press's name only, got {compression_ratio} beside {given!s:.120}, "
            "which has its own"
        )
    if is_press(given):
        return given
    wrapped = _wrapped(given)
    if wrapped is None:
        raise InvalidArgumentError(f"expected a press, such as {_EXAMPLE}, got {_described(given)}")
    return wrapped


def _of_name(name: str, compression_ratio: float | None) -> Any:
    info = find(name)
    if info.takes_ratio and compression_ratio is None:
        raise InvalidArgumentError(
            f"expected a ratio with the name of a press, got {name!r} alone, which would remove nothing: pass "
            f"get_press({name!r}, 0.7), or compression_ratio=0.7 beside the name where a function takes both"
        )
    if not info.takes_ratio and compression_ratio:
        raise InvalidArgumentError(f"expected no compression_ratio with {name!r}, which takes none, got one")
    return made(name, compression_ratio or 0.0)


def _wrapped(given: object) -> Any | None:
    """Returns a press around one of another library; None for what is no such press.

    Nothing is imported to find out: a library that is not loaded has made no object.
    """
    from kvzip_press.presses import WRAPPERS

    for base, target in WRAPPERS.items():
        module, _, name = base.partition(":")
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(given, kind):
            return resolved(target)(given)
    return None


def _described(given: object) -> str:
    """Says what was given instead of a press, and what to do."""
    if given is None:
        return 'None; for a cache that keeps everything, pass get_press("none")'
    if isinstance(given, type):
        return f"the class {given.__name__}: make one, {given.__name__}(compression_ratio=0.7)"
    if isinstance(given, Real):
        return f"{given}: a ratio belongs to a press"
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__}: ComposedPress([...]) makes one press of several"
    return f"{type(given).__name__}"
