"""What pairs are worth when an eviction is due, and which of them stay whatever they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.pair_pool.stack import marked_pairs, numbers_of
from kvzip_press.cache.ragged_layer import RaggedLayer

STAYS = torch.finfo(torch.float32).max
"""The score of a pair that no eviction takes and no budget counts; finite, as files want scores to be."""


@dataclass(frozen=True)
class Worth:
    """What the pairs of one layer are worth when an eviction is due.

    Attributes:
        packed: fp32 ``[total_kept]``.
        tail: fp32 ``[batch, num_heads, n]``; anything finite at padding.
        carried: Whether the pairs that stay carry it to the next eviction, in place of what they have.
    """

    packed: torch.Tensor
    tail: torch.Tensor
    carried: bool = True


def held_tokens(layers: Sequence[RaggedLayer]) -> torch.Tensor:
    """Returns how many tokens' worth of pairs each row holds, rounded up, int64 ``[batch]``.

    Those whose score is :data:`STAYS` are not counted.
    """
    packed = numbers_of(layers)
    held = (packed.seqlens - staying_pairs(packed)).long().unflatten(0, (len(layers), -1)).sum(dim=(0, 2))
    heads = len(layers) * packed.num_heads
    return (held + heads - 1) // heads + layers[0].n_tail_tokens


def staying_pairs(packed: PackedPairs) -> torch.Tensor:
    """Returns how many pairs of each row and head stay in any case, int64 ``[num_rows, num_heads]``."""
    stays = torch.zeros_like(packed.positions) if packed.scores is None else packed.scores == STAYS
    return marked_pairs(packed, stays).view(packed.num_rows, packed.num_heads)
