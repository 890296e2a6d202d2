"""The one exception tree of the project: catch :class:`KVzipPressError` to catch them all."""

import difflib
from collections.abc import Iterable


class KVzipPressError(Exception):
    """Base of every error that kvzip-press raises on purpose."""


class InvalidArgumentError(KVzipPressError, ValueError):
    """A value is out of range, or of the wrong shape or dtype. The message says what was expected and what came."""


class UnsupportedModelError(KVzipPressError, TypeError):
    """The model has no attention layer that can be compressed, or one whose attention is not understood."""


class UnsupportedCacheError(KVzipPressError, TypeError):
    """The cache is of a kind that cannot be compressed (static, quantized, offloaded ...), or was already evicted."""


class CacheMismatchError(KVzipPressError, RuntimeError):
    """A ragged cache was used with a model or an attention function that it was not made for."""


class CacheFileError(KVzipPressError):
    """A file cannot be written, is missing, truncated or changed, or is not ours. The message names the path."""


class RunDirectoryError(KVzipPressError, OSError):
    """A run's directory is in use, of another run, damaged, or cannot be written. The message names the path."""


class SessionClosedError(KVzipPressError, RuntimeError):
    """A session was closed before an answer was complete, or was asked after that."""


class BudgetMismatchError(KVzipPressError, RuntimeError):
    """A cache holds more or less than its press was asked for, so that the figures about it would be false."""


class NothingEvictedError(KVzipPressError, ValueError):
    """A press was to be evaluated where it removes nothing: the full cache's figure would appear under its name."""


class WorkerError(KVzipPressError, RuntimeError):
    """The processes that share a run die over the same contexts again and again."""


class ModelNotFoundError(KVzipPressError, OSError):
    """A model's files are neither on this machine nor reachable."""


class DataNotFoundError(KVzipPressError, OSError):
    """A data set's files are neither on this machine nor reachable. The message says what to do."""


class DiskFullError(KVzipPressError, OSError):
    """The disk has no room for what has to be stored there."""


class MissingDependencyError(KVzipPressError, ImportError):
    """An optional package is needed, but is missing or of a version that does not work."""


def install_command(extra: str) -> str:
    """Returns the command that adds what an extra of kvzip-press needs.

    It is the same however kvzip-press was installed, from an index, a wheel or a checkout: pip takes what is installed
    for the package that is asked for, reads the extra there, and adds what is missing. An editable checkout stays one.
    """
    return f"pip install 'kvzip-press[{extra}]'"


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Returns ``; did you mean 'x'?`` with the known name closest to ``given``; an empty text if none is close.

    Small and capital letters count as the same.
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def first_line_of(error: BaseException) -> str:
    """Returns the type of an error and the first line of its message, which may be long where errors are wrapped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
