"""What the core's tests share: a press with known random scores, and the keep mask of a compressed cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvzip_press import RaggedCache

KeepMasks = dict[int, torch.Tensor]


def _keep_masks(cache: Any, valid: torch.Tensor) -> KeepMasks:
    """``layer_idx -> [rows, heads, n]`` bool of a cache's packed context, from the positions that it reports."""
    masks = {}
    for layer_idx, layer in RaggedCache.of(cache).ragged_layers():
        mask = torch.zeros(layer.packed.num_rows, layer.packed.num_heads, valid.shape[1], dtype=torch.bool)
        for row, heads in enumerate(RaggedCache.of(cache).kept_positions(layer_idx)):
            columns = valid[row].nonzero()[:, 0]
            for head, positions in enumerate(heads):
                mask[row, head, columns[positions.long()]] = True
        masks[layer_idx] = mask
    return masks


@pytest.fixture
def keep_masks() -> Callable[[Any, torch.Tensor], KeepMasks]:
    return _keep_masks
