"""Presses that evict pairs while the model writes, over one schedule: one file each, named after its paper."""

from kvzip_press.presses.decoding.decode_press import DecodePress
from kvzip_press.presses.decoding.h2o import H2OPress
from kvzip_press.presses.decoding.knorm import KnormDecodePress
from kvzip_press.presses.decoding.kv_compress import KVCompressPress
from kvzip_press.presses.decoding.random import RandomDecodePress
from kvzip_press.presses.decoding.rkv import RKVPress
from kvzip_press.presses.decoding.snapkv import SnapKVDecodePress
from kvzip_press.presses.decoding.streaming_llm import StreamingLLMDecodePress
from kvzip_press.presses.decoding.tova import TOVADecodePress
from kvzip_press.presses.decoding.triattention import QueryStatistics, TriAttentionPress, calibrate_queries
from kvzip_press.presses.decoding.trimkv import TrimKVGates, TrimKVPress

__all__ = [
    "DecodePress",
    "H2OPress",
    "KVCompressPress",
    "KnormDecodePress",
    "QueryStatistics",
    "RKVPress",
    "RandomDecodePress",
    "SnapKVDecodePress",
    "StreamingLLMDecodePress",
    "TOVADecodePress",
    "TriAttentionPress",
    "TrimKVGates",
    "TrimKVPress",
    "calibrate_queries",
]
