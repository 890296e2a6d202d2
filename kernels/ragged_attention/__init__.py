"""Exact attention to a packed context, in which each head has its own length, and to a dense tail behind it."""

from kvzip_press.kernels.ragged_attention.api import ragged_attention
from kvzip_press.kernels.ragged_attention.parted import Part, parted_attention

__all__ = ["Part", "parted_attention", "ragged_attention"]
