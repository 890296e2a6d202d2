"""A token's keys and values into the tail of a cache, at a place that is known on the device."""

from kvzip_press.kernels.tail_append.api import tail_append

__all__ = ["tail_append"]
