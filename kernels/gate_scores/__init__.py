"""Fast KVzip's scores, from what a gate's projections give."""

from kvzip_press.kernels.gate_scores.api import gate_scores

__all__ = ["gate_scores"]
