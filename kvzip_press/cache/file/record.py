"""What a cache file says of its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

FORMAT = 1
TEXT = "kvzip_press"  # key of the safetensors metadata; the text's seal is stored beside it
LIMIT = 2**31  # no length, count or position of a cache reaches it: positions are int32
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The settings that determine, with the weights, what keys and values mean. Those that count are listed, not those that
# do not: transformers adds settings in every release, and a file should be readable with the next one.
_SETTINGS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps", "layer_types"),
    *("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("attention_multiplier", "original_max_position_embeddings"),
)


@dataclass(frozen=True)
class LayerRecord:
    """The metadata of one layer.

    Attributes:
        kind: "ragged", "sliding", "dense" or "shared".
        num_heads: Number of KV heads.
        head_dim: Width of a key.
        v_head_dim: Width of a value.
        fingerprint: Fingerprint of the attention module that made a ragged layer; empty for other layers.
        n_protected: For each packed row of a ragged layer, the number of first tokens that no head has lost.
        n_padding: For each packed row of a ragged layer, the columns of padding on its left; -1 if there is padding
            elsewhere.
        context_ends: For each packed row of a ragged layer, the position after its context.
        has_row_index: Whether batch rows point to packed rows.
        sliding_window: Window of a sliding layer, in tokens; 0 for other layers.
        has_scores: Whether the pairs of a ragged layer carry scores; False for files that do not say.
        storage: The name of how the pairs of a ragged layer are stored; "model" for other layers, and for files that do
            not say.
        shares_with: Index of the layer whose pairs a shared layer reads; 0 for other layers.
    """

    kind: str
    num_heads: int
    head_dim: int
    v_head_dim: int
    fingerprint: str = ""
    n_protected: tuple[int, ...] = ()
    n_padding: tuple[int, ...] = ()
    context_ends: tuple[int, ...] = ()
    has_row_index: bool = False
    sliding_window: int = 0
    has_scores: bool = False
    storage: str = "model"
    shares_with: int = 0


@dataclass(frozen=True)
class ColdRecord:
    """The metadata of a span whose evicted pairs are in the file.

    Attributes:
        amount: How much was asked for: the one argument of :func:`kvzip_press.budget.amount.amount_of`.
        allocation: Under which allocation: its name and arguments.
        counted: Which protected positions count towards the budget: "all", "none" or "some".
        rows: For each packed row of the cache, the row of the span that it is.
        n_rows: Number of rows of the span.
        n_tokens: Number of its columns.
        in_chunks: Whether it was read in chunks.
        uniform: Whether scores are weights of attention; what uniform attention gives is then there too.
    """

    amount: dict[str, Any]
    allocation: dict[str, Any]
    counted: str
    rows: tuple[int, ...]
    n_rows: int
    n_tokens: int
    in_chunks: bool
    uniform: bool


@dataclass(frozen=True)
class CacheRecord:
    """The metadata of a cache.

    Attributes:
        format: Version of the file format.
        kvzip_press: Version of this package that wrote the file; like the next two, for information only.
        transformers: Version of transformers at that time.
        torch: Version of torch at that time.
        press: Description of the press; empty if none was given.
        config: The settings that decide what keys and values mean.
        config_hash: SHA-256 of these settings.
        dtype: Dtype of keys and values, as safetensors names it.
        batch_size: Number of batch rows.
        n_context: Number of tokens of the compressed context.
        n_seen: Number of tokens seen; those from ``n_context`` on are the tail.
        tail_padding: Columns of padding on the left of the tail, by batch row; empty if the rows have never differed.
        n_positions: One more than the largest kept position; more than ``n_context`` if position ids began late.
        turn_starts: Tokens seen before each kept turn: one number, or one for each batch row.
        layers: One record per layer.
        tensors: SHA-256 of each tensor's bytes.
        cold: One record for each span whose evicted pairs can come back.
    """

    format: int
    kvzip_press: str
    transformers: str
    torch: str
    press: str
    config: dict[str, Any]
    config_hash: str
    dtype: str
    batch_size: int
    n_context: int
    n_seen: int
    tail_padding: tuple[int, ...]
    n_positions: int
    turn_starts: tuple[int | list[int], ...]
    layers: tuple[LayerRecord, ...]
    tensors: dict[str, str]
    cold: tuple[ColdRecord, ...] = ()


def settings_of(config: Any) -> dict[str, Any]:
    """Returns the settings of :data:`_SETTINGS` that are set, and RoPE's, always spelled as in transformers 5."""
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        theta, local = getattr(config, "rope_theta", None), getattr(config, "rope_local_base_freq", None)
        rope = {"rope_type": "default", "rope_theta": theta, **(getattr(config, "rope_scaling", None) or {})}
        if local is not None:
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    partial = getattr(config, "partial_rotary_factor", None) or rope.get("partial_rotary_factor")
    rope = {name: value for name, value in rope.items() if name not in ("partial_rotary_factor", "type")}
    settings |= {"rope_parameters": rope, "partial_rotary_factor": None if partial == 1 else partial}
    plain: dict[str, Any] = _plain(settings)
    return plain


def _plain(value: Any) -> Any:
    """Returns a value as JSON gives it back, with 10000 and 10000.0 alike and without items that are None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str | bool) else str(value)


def live_tokens(n_seen: int, window: int) -> int:
    """Returns how many tokens a dense layer (window 0) or a sliding one still needs.

    The next token sees itself and these.
    """
    return min(n_seen, window - 1) if window > 1 else n_seen
