"""KV-Compress (Rehg 2024, https://arxiv.org/abs/2410.00161): squared attention, and a budget of whole pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import max_pool1d

from kvzip_press.budget.allocators import Allocation, Pages
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding.windows import WindowPress


@dataclass(frozen=True)
class KVCompressPress(WindowPress):
    """Keeps the pairs whose squared attention adds up to most, in whole pages, while decoding.

    A pair is worth the sum of the squares of the probabilities with which queries attended to it, over the query heads
    of its group. Of a prompt the last ``prompt_queries`` have a say, and in each query head a pair gets the largest sum
    of ``kernel_size`` neighbours; every query after it counts. All heads of all layers compete, page by page. Pages are
    a matter of the budget here: heads lie one after another in memory, without holes.

    Args:
        allocation: :class:`kvzip_press.budget.allocators.Pages` of 16 pairs; ``Pages(page_size=64)`` or the allocations
            of :class:`DecodePress`.
        window_size: Number of last tokens that no eviction takes (64).
        kernel_size: Width of the maximum over neighbours in a prompt, an odd number (7).
        prompt_queries: Number of a prompt's last queries (32), at least 1.

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    by_layer: ClassVar[bool] = False

    least_window: ClassVar[int] = 0

    allocation: str | Allocation = Pages()  # noqa: RUF009  # frozen
    window_size: int = field(default=64, kw_only=True)
    kernel_size: int = field(default=7, kw_only=True)
    prompt_queries: int = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        if self.prompt_queries < 1:
            raise InvalidArgumentError(f"KVCompressPress: expected prompt_queries >= 1, got {self.prompt_queries}")
        super().__post_init__()

    @property
    def n_queries(self) -> None:
        """All since the last eviction."""

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns what pairs carry and the squares of what they have got since."""
        if not pairs.of_prompt:
            return pairs.scores + pairs.received(squared=True)
        got = torch.stack([block.square().sum(dim=3) for block in pairs.attention(self.prompt_queries)]).sum(dim=0)
        pooled = max_pool1d(got.flatten(0, 2), self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pairs.scores + pooled.view_as(got).masked_fill(~pairs.valid.unsqueeze(2), 0).sum(dim=2)
