"""KV-cache compression presses for Hugging Face models, with head-wise eviction that really frees memory.

Names are imported when they are first used, so that ``import kvzip_press`` is fast and has no side effects.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvzip_press.version import __version__ as __version__

# In a checkout, this folder lies beside those of three of its subpackages (pyproject.toml, package-dir). Started there,
# Python finds this one first, also if the package is installed elsewhere.
_HERE = Path(__file__).parent
if not (_HERE / "presses").exists() and (_HERE.parent / "presses" / "__init__.py").exists():
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from kvzip_press.attention.implementation import attach, detach
    from kvzip_press.budget.scores import Scores
    from kvzip_press.cache.ragged_cache import RaggedCache
    from kvzip_press.cache.recall.clusters import ClusterRecall
    from kvzip_press.cache.recall.making import with_recall, without_recall
    from kvzip_press.cache.recall.pages import PageRecall
    from kvzip_press.calibration.on_prompts import calibrate
    from kvzip_press.decoding.answering import answer, question_ids
    from kvzip_press.decoding.generation import generate
    from kvzip_press.decoding.monitor import answer_restoring
    from kvzip_press.decoding.sampling import Sampling
    from kvzip_press.decoding.step import DecodeStep
    from kvzip_press.heads.scores import HeadScores
    from kvzip_press.loading.by_name import load_model
    from kvzip_press.prefilling.chunked import compress_in_chunks
    from kvzip_press.prefilling.compressed import compress
    from kvzip_press.prefilling.contexts import prefill
    from kvzip_press.prefilling.whole import Prefill
    from kvzip_press.press import Press
    from kvzip_press.presses.composed import ComposedPress
    from kvzip_press.presses.decoding import (
        DecodePress,
        H2OPress,
        KnormDecodePress,
        KVCompressPress,
        RKVPress,
        SnapKVDecodePress,
        StreamingLLMDecodePress,
        TOVADecodePress,
        TriAttentionPress,
        TrimKVPress,
    )
    from kvzip_press.presses.duo_attention import DuoAttentionPress
    from kvzip_press.presses.fastkvzip import FastKVzipPress, Gates
    from kvzip_press.presses.kvpress_adapter import RaggedPress
    from kvzip_press.presses.kvzip import KVzipPress
    from kvzip_press.presses.kvzip_head import KVzipHeadPress
    from kvzip_press.presses.random import RandomPress
    from kvzip_press.registry import get_press, presses_table, register_press
    from kvzip_press.serving.session import Session
    from kvzip_press.sharing.context import share_layers

_EXPORTS = {
    "ClusterRecall": "kvzip_press.cache.recall.clusters",
    "ComposedPress": "kvzip_press.presses.composed",
    **dict.fromkeys(
        (
            "DecodePress",
            "H2OPress",
            "KVCompressPress",
            "KnormDecodePress",
            "RKVPress",
            "SnapKVDecodePress",
            "StreamingLLMDecodePress",
            "TOVADecodePress",
            "TriAttentionPress",
            "TrimKVPress",
        ),
        "kvzip_press.presses.decoding",
    ),
    "DuoAttentionPress": "kvzip_press.presses.duo_attention",
    "FastKVzipPress": "kvzip_press.presses.fastkvzip",
    "Gates": "kvzip_press.presses.fastkvzip",
    "HeadScores": "kvzip_press.heads.scores",
    "KVzipHeadPress": "kvzip_press.presses.kvzip_head",
    "KVzipPress": "kvzip_press.presses.kvzip",
    "RandomPress": "kvzip_press.presses.random",
    "RaggedPress": "kvzip_press.presses.kvpress_adapter",
    "DecodeStep": "kvzip_press.decoding.step",
    "Press": "kvzip_press.press",
    "Prefill": "kvzip_press.prefilling.whole",
    "Sampling": "kvzip_press.decoding.sampling",
    "Scores": "kvzip_press.budget.scores",
    "Session": "kvzip_press.serving.session",
    "PageRecall": "kvzip_press.cache.recall.pages",
    "RaggedCache": "kvzip_press.cache.ragged_cache",
    "answer": "kvzip_press.decoding.answering",
    "answer_restoring": "kvzip_press.decoding.monitor",
    "attach": "kvzip_press.attention.implementation",
    "calibrate": "kvzip_press.calibration.on_prompts",
    "compress": "kvzip_press.prefilling.compressed",
    "compress_in_chunks": "kvzip_press.prefilling.chunked",
    "detach": "kvzip_press.attention.implementation",
    "generate": "kvzip_press.decoding.generation",
    "get_press": "kvzip_press.registry",
    "load_model": "kvzip_press.loading.by_name",
    "prefill": "kvzip_press.prefilling.contexts",
    "presses_table": "kvzip_press.registry",
    "question_ids": "kvzip_press.decoding.answering",
    "register_press": "kvzip_press.registry",
    "share_layers": "kvzip_press.sharing.context",
    "with_recall": "kvzip_press.cache.recall.making",
    "without_recall": "kvzip_press.cache.recall.making",
}

__all__ = [
    "ClusterRecall",
    "ComposedPress",
    "DecodePress",
    "DecodeStep",
    "DuoAttentionPress",
    "FastKVzipPress",
    "Gates",
    "H2OPress",
    "HeadScores",
    "KVCompressPress",
    "KVzipHeadPress",
    "KVzipPress",
    "KnormDecodePress",
    "PageRecall",
    "Prefill",
    "Press",
    "RKVPress",
    "RaggedCache",
    "RaggedPress",
    "RandomPress",
    "Sampling",
    "Scores",
    "Session",
    "SnapKVDecodePress",
    "StreamingLLMDecodePress",
    "TOVADecodePress",
    "TriAttentionPress",
    "TrimKVPress",
    "answer",
    "answer_restoring",
    "attach",
    "calibrate",
    "compress",
    "compress_in_chunks",
    "detach",
    "generate",
    "get_press",
    "load_model",
    "prefill",
    "presses_table",
    "question_ids",
    "register_press",
    "share_layers",
    "with_recall",
    "without_recall",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kvzip_press' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
