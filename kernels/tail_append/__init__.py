"""Writes a token's keys and values into the tail of a cache, at an index that is read on the device."""

from kvzip_press.kernels.tail_append.api import tail_append

__all__ = ["tail_append"]
