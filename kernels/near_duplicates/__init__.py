"""For each key of a head the newest other key that says nearly the same, without the matrix of all cosines."""

from kvzip_press.kernels.near_duplicates.api import near_duplicates

__all__ = ["near_duplicates"]
