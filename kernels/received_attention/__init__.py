"""What attention each key gets from some queries together, without the matrix of all probabilities."""

from kvzip_press.kernels.received_attention.api import received_attention

__all__ = ["received_attention"]
