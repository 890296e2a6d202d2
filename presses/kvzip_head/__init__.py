"""Context-independent KVzip (https://arxiv.org/abs/2505.23416): drops whole heads, which are scored once per model."""

from kvzip_press.presses.kvzip_head.builtin_texts import builtin_pages, builtin_texts
from kvzip_press.presses.kvzip_head.head_press import KVzipHeadPress
from kvzip_press.presses.kvzip_head.replayed_scores import compute_head_scores

__all__ = ["KVzipHeadPress", "builtin_pages", "builtin_texts", "compute_head_scores"]
