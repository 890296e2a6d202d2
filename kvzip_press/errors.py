"""The one exception tree of the project: catch :class:`KVzipPressError` to catch them all."""

import difflib
from collections.abc import Iterable


class KVzipPressError(Exception):
    """Base of every error that kvzip-press raises on purpose."""


class InvalidArgumentError(KVzipPressError, ValueError):
    """A value outside its range, or of the wrong shape or dtype. The message names what was expected and what came."""


class UnsupportedModelError(KVzipPressError, TypeError):
    """The model has no attention layer that can be compressed, or one whose attention is not understood."""


class UnsupportedCacheError(KVzipPressError, TypeError):
    """The cache is of a kind that cannot be compressed (static, quantized, already ragged ...)."""


class CacheMismatchError(KVzipPressError, RuntimeError):
    """A ragged cache met a model or an attention function that it was not made for."""


class CacheFileError(KVzipPressError):
    """A file of a cache cannot be written, is absent, torn or changed, or is none of ours. The message has its path."""


class RunDirectoryError(KVzipPressError, OSError):
    """A run's directory is in use, of another run, damaged, or cannot be written. The message has its path."""


class BudgetMismatchError(KVzipPressError, RuntimeError):
    """A cache holds more or less than its press was asked for: its rows would be a lie."""


class NothingEvictedError(KVzipPressError, ValueError):
    """A press was to be evaluated where it removes nothing: the figure would be the full cache's under its name."""


class WorkerError(KVzipPressError, RuntimeError):
    """Processes that share a run die over the same contexts again and again."""


class ModelNotFoundError(KVzipPressError, OSError):
    """A model's files are neither on this machine nor reachable."""


class DataNotFoundError(KVzipPressError, OSError):
    """A data set's files are neither on this machine nor reachable. The message says what to do."""


class DiskFullError(KVzipPressError, OSError):
    """There is no room on the disk for what has to be kept there."""


class MissingDependencyError(KVzipPressError, ImportError):
    """An optional package is needed, and is absent or of a version that does not work."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the known name nearest to ``given``; empty where none is near."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
