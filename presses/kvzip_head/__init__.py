"""Context-independent KVzip (https://arxiv.org/abs/2505.23416): whole heads are dropped, scored once a model."""

from kvzip_press.presses.kvzip_head.duo_pattern import export_duo, import_duo
from kvzip_press.presses.kvzip_head.head_press import KVzipHeadPress
from kvzip_press.presses.kvzip_head.head_scores import HeadScores
from kvzip_press.presses.kvzip_head.shipped_scores import builtin_texts, shipped_scores

__all__ = ["HeadScores", "KVzipHeadPress", "builtin_texts", "export_duo", "import_duo", "shipped_scores"]
