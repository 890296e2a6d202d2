"""KV-Compress (Rehg 2024, https://arxiv.org/abs/2410.00161): squared attention, and a budget of whole pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import max_pool1d

from kvzip_press.budget.allocators import Allocation, Global
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Candidates, Counts
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding.windows import WindowPress


@dataclass(frozen=True)
class WholePages(Global):
    """All heads of all layers compete for pages: each keeps whole pages of its best pairs, but for its last one.

    A page of a head is worth as much as its best pair, which is the last that has to go before the page is free. The
    worst pages go first, until the rest fits the budget. Pages with protected pairs stay.

    Args:
        page_size: Pairs of a page, at least 1.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    page_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.page_size, int) or self.page_size < 1:
            raise InvalidArgumentError(f"expected page_size to be an int of at least 1, got {self.page_size!r}")

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """Returns ``layer_idx -> [heads]``, int64: how many unprotected pairs each head of a row keeps."""
        pool = self.pools(row.heads)[0]
        heads = [(i, head) for i, n_heads in row.heads.items() for head in range(n_heads)]
        asked = self.asked(amount, list(row.heads), row.n_counted(pool), len(heads), row.n_held(pool))
        device = row.values[heads[0][0]].device
        values = torch.cat([row.values[i].to(device) for i in row.heads]).sort(dim=1, descending=True, stable=True)[0]
        paid = torch.tensor([row.charged[i][head] for i, head in heads], device=device)
        free = torch.tensor([row.free[i][head] for i, head in heads], device=device)
        first = torch.arange(0, values.shape[1] + int(paid.max()), self.page_size, device=device)  # of each page
        best = values.gather(1, (first - paid[:, None]).clamp(0, values.shape[1] - 1))
        best = best.where(first >= paid[:, None], torch.inf).where(first < (paid + free)[:, None], -torch.inf)
        n_pages = min(max(asked // self.page_size, int(best.isposinf().sum())), int((best > -torch.inf).sum()))
        stays = torch.zeros(best.numel(), dtype=torch.int64, device=device)
        stays[best.flatten().argsort(descending=True, stable=True)[:n_pages]] = 1
        kept = torch.minimum(stays.view_as(best).sum(dim=1) * self.page_size, paid + free)
        parts = (kept - paid).clamp(min=0).split(list(row.heads.values()))
        return {i: part.to(row.values[i].device) for i, part in zip(row.heads, parts, strict=True)}


@dataclass(frozen=True)
class KVCompressPress(WindowPress):
    """Keeps the pairs whose squared attention adds up to most, in whole pages, while decoding.

    A pair is worth the sum of the squares of the probabilities with which queries attended to it, over the query heads
    of its group. Of a prompt the last ``prompt_queries`` have a say, and in each query head a pair gets the largest sum
    of ``kernel_size`` neighbours; every query after it counts. All heads of all layers compete, page by page. Pages are
    a matter of the budget here: heads lie one after another in memory, without holes.

    Args:
        allocation: :class:`WholePages` of 16 pairs; ``WholePages(page_size=64)`` or the allocations of
            :class:`DecodePress`.
        window_size: Number of last tokens that no eviction takes (64).
        kernel_size: Width of the maximum over neighbours in a prompt, an odd number (7).
        prompt_queries: Number of a prompt's last queries (32), at least 1.

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    least_window: ClassVar[int] = 0

    allocation: str | Allocation = WholePages()
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
        last = self.prompt_queries if pairs.of_prompt else None
        got = sum(block.square().sum(dim=3) for block in pairs.attention(last))
        if isinstance(got, int):
            return pairs.scores
        if pairs.of_prompt:
            pooled = max_pool1d(got.flatten(0, 2), self.kernel_size, stride=1, padding=self.kernel_size // 2)
            got = pooled.view_as(got).masked_fill(~pairs.valid.unsqueeze(2), 0)
        return pairs.scores + got.sum(dim=2)
