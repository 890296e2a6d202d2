"""Fast KVzip (https://arxiv.org/abs/2601.17668): gates that foresee KVzip's scores, and their training."""

from kvzip_press.presses.fastkvzip.fast_press import FastKVzipPress
from kvzip_press.presses.fastkvzip.finding import shipped_gates
from kvzip_press.presses.fastkvzip.gate import LayerGate
from kvzip_press.presses.fastkvzip.gates import Gates

__all__ = ["FastKVzipPress", "Gates", "LayerGate", "shipped_gates"]
