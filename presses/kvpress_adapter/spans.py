"""kvpress presses that can score a span of tokens by itself, behind a context that was evicted already.

They look at the span's own keys, values, hidden states and position embeddings. Others expect the beginning of a
sequence: Expected Attention counts positions from 0, StreamingLLM keeps the first tokens it is given.
"""

from __future__ import annotations

from typing import Any

_ANY_SPAN = {"KeyDiffPress", "KnormPress", "SnapKVPress", "TOVAPress"}


def scores_any_span(press: Any) -> bool:
    """Whether a kvpress press scores any span of tokens."""
    return type(press).__name__ in _ANY_SPAN and type(press).__module__.startswith("kvpress.")
