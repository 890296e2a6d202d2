"""TrimKV (https://arxiv.org/abs/2512.03324): gates say, when a pair is written, how long it will be worth keeping."""

from kvzip_press.presses.decoding.trimkv.gates import TrimKVGates
from kvzip_press.presses.decoding.trimkv.trim_press import TrimKVPress

__all__ = ["TrimKVGates", "TrimKVPress"]
