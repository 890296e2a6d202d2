"""Writes a token's keys, values and queries into the tail of a cache, at an index that is read on the device."""

from kvzip_press.kernels.tail_append.api import tail_append
from kvzip_press.kernels.tail_append.queries import Queries

__all__ = ["Queries", "tail_append"]
