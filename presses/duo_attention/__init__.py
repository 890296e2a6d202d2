"""DuoAttention (https://arxiv.org/abs/2410.10819): retrieval heads keep the context, streaming heads its two ends."""

from kvzip_press.presses.duo_attention.duo_press import DuoAttentionPress
from kvzip_press.presses.duo_attention.mean_attention import compute_head_scores
from kvzip_press.presses.duo_attention.pattern import export_duo, import_duo

__all__ = ["DuoAttentionPress", "compute_head_scores", "export_duo", "import_duo"]
