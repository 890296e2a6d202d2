"""Exact attention to a packed context with its own length for each head, and a dense tail behind it."""

from kvzip_press.kernels.ragged_attention.api import ragged_attention

__all__ = ["ragged_attention"]
