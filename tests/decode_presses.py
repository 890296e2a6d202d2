"""The presses that evict while the model writes, with small budgets, and what several test modules do with them."""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press.budget.allocators import ALLOCATIONS, Table
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.presses.decoding import (
    DecodePress,
    H2OPress,
    KnormDecodePress,
    KVCompressPress,
    RandomDecodePress,
    RKVPress,
    SnapKVDecodePress,
    StreamingLLMDecodePress,
    TOVADecodePress,
)

Made = tuple[type[DecodePress], dict[str, Any]]
"""A press and its options."""

BUDGET, BUFFER = 24, 8
PRESSES: tuple[Made, ...] = (  # those that need no file of a model's own
    (StreamingLLMDecodePress, {"n_sink": 2}),
    (KnormDecodePress, {"skip_layers": (0,)}),
    (TOVADecodePress, {}),
    (SnapKVDecodePress, {"window_size": 6}),
    (H2OPress, {}),
    (KVCompressPress, {"window_size": 6, "allocation": "global"}),
    (RKVPress, {}),
    (RandomDecodePress, {}),
)
# The allocations that spend a budget and need no argument.
SPENDING = sorted(name for name, kind in ALLOCATIONS.items() if not kind.is_outcome and kind is not Table)


def made(kind_and_options: Made, **options: Any) -> DecodePress:
    """The press, by default with the small budget; options replace its own."""
    kind, own = kind_and_options
    return kind(**{"budget": BUDGET, "buffer": BUFFER} | own | options)


def distinct_ids(length: int, batch: int = 1) -> torch.Tensor:
    """No token twice in a row: equal ones would tie."""
    rows = [3 + torch.randperm(250, generator=torch.Generator().manual_seed(seed)) for seed in range(batch)]
    return torch.stack(rows)[:, :length]


@torch.no_grad()
def step(model: Any, cache: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    """Reads tokens behind a cache, and returns the logits of the last one."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **given).logits[:, -1]


def ragged(cache: Any) -> list[RaggedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]


def held(cache: Any, row: int = 0) -> list[list[int]]:
    """Positions of each layer and head, tails included."""
    positions = []
    for layer in ragged(cache):
        end, n = int(layer.next_positions[row]), int(layer.n_tail_tokens[row])
        tail = list(range(end - n, end))
        positions += [layer.packed.head_positions(row, h).tolist() + tail for h in range(layer.packed.num_heads)]
    return positions
