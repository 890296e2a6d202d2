"""TriAttention: pairs that are near, on RoPE's circles, to where queries usually look."""

from kvzip_press.presses.decoding.triattention.calibration import calibrate_queries
from kvzip_press.presses.decoding.triattention.statistics import QueryStatistics
from kvzip_press.presses.decoding.triattention.tri_press import TriAttentionPress

__all__ = ["QueryStatistics", "TriAttentionPress", "calibrate_queries"]
