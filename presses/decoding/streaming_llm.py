"""StreamingLLM (Xiao et al. 2023, https://arxiv.org/abs/2309.17453): the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.presses.decoding.decode_press import DecodePress


@dataclass(frozen=True)
class StreamingLLMDecodePress(DecodePress):
    """Keeps the first tokens (attention sinks) and the newest ones, and evicts what lies between, while decoding.

    What a pair is worth is its position. Positions are those that the model's RoPE used: unlike the authors' code, keys
    are not turned to where they would be in the cache, so the model sees the gap. With ``buffer=1`` a pair goes for
    each that is written, as in the paper; with more, up to ``buffer`` older ones are there besides.

    Args:
        n_sink: Number of first tokens that stay (4 in the paper); the chat-template prefix instead if it is known.
        allocation: It makes no difference but for ties: a position is worth the same in every head.

    The other arguments are those of :class:`DecodePress`.
    """

    by_layer: ClassVar[bool] = False

    n_sink: int = field(default=4, kw_only=True)

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns positions."""
        return pairs.positions.float()
