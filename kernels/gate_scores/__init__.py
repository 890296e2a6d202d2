"""Fast KVzip's scores, computed from the outputs of a gate's projections."""

from kvzip_press.kernels.gate_scores.api import gate_scores

__all__ = ["gate_scores"]
