"""Real eviction: a keep mask becomes packed storage of exactly the kept pairs, and back."""

from kvzip_press.kernels.ragged_pack.api import merge, pack, select_rows, unpack

__all__ = ["merge", "pack", "select_rows", "unpack"]
