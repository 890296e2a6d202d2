"""Exact attention to dense keys that also gives the log-sum-exp, and the exact merge of two such results."""

from kvzip_press.kernels.dense_attention.api import attention_with_lse
from kvzip_press.kernels.dense_attention.merge import merge_attention

__all__ = ["attention_with_lse", "merge_attention"]
