"""Real eviction: a keep mask becomes packed storage of exactly the kept pairs, whatever columns a pair has."""

from kvzip_press.kernels.ragged_pack.api import merge, pack, select_rows
from kvzip_press.kernels.ragged_pack.packed import Packed

__all__ = ["Packed", "merge", "pack", "select_rows"]
