"""The one exception tree of the project: catch :class:`KVzipPressError` to catch them all."""


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


class ModelNotFoundError(KVzipPressError, OSError):
    """A model's files are neither on this machine nor reachable."""


class MissingDependencyError(KVzipPressError, ImportError):
    """An optional package is needed, and is absent or of a version that does not work."""
