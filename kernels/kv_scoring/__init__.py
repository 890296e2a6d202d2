"""KVzip's importance score of context keys, without the matrix of all rows by all keys."""

from kvzip_press.kernels.kv_scoring.api import kv_scoring

__all__ = ["kv_scoring"]
