"""KV-Compress's budgets: whole pages, for caches that hold pairs in pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvzip_press.arguments.numbers import is_int
from kvzip_press.budget.allocators.base import Allocation
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Candidates, Counts, Pool
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Pages(Allocation):
    """All pages of all layers and heads compete, and heads keep whole pages: "pages".

    KV-Compress, https://arxiv.org/abs/2410.00161. A head's pairs, best first, fill pages; a page is worth as much as
    its best pair, the last one that must go to free it. The cheapest pages go first. So a head keeps a multiple of
    ``page_size`` pairs, protected ones included, or everything it has; and the whole keeps what was asked for or up to
    ``page_size - 1`` pairs less (an engine's memory is never exceeded). Every layer without protected pairs keeps at
    least one page, which may exceed a very small budget. Budgets are nested, for a page size. Budgets are per KV head.

    Args:
        page_size: Pairs of one head that a page holds: 16 (KV-Compress's own), or 64, say.
        min_kept_per_head: Pairs that every head keeps at least, rounded up to whole pages, as far as the budget allows.
        safeguard: See :class:`Allocation`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    page_size: int = 16

    name: ClassVar[str] = "pages"
    layers_compete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.page_size) or self.page_size < 1:
            raise InvalidArgumentError(f"expected page_size to be an int of at least 1, got {self.page_size!r}")

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """Returns one pool with everything."""
        return [[(i, slice(None)) for i in heads]]

    @property
    def rounding(self) -> int:
        """One pair less than a page."""
        return self.page_size - 1

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """Returns ``layer_idx -> [heads]``, int64: how many unprotected pairs each head of a row keeps."""
        pool = self.pools(row.heads)[0]
        sizes = row.sizes(pool)
        asked = self.asked(amount, list(row.heads), row.n_counted(pool), len(sizes), row.n_held(pool))
        budget, best = row.to_spend(pool, asked), row.best_first(pool)
        if budget == sum(sizes):
            spent = torch.tensor(sizes)
        else:
            spent = self._spent(best, sizes, [n for heads in row.protected.values() for n in heads], budget)
        parts = spent.split(list(row.heads.values()))
        return {i: part.to(row.values[i].device) for i, part in zip(row.heads, parts, strict=True)}

    def _spent(self, best: torch.Tensor, sizes: list[int], protected: list[int], budget: int) -> torch.Tensor:
        """Returns how many pairs each head keeps, ``[heads]``, int64: those of the pages that the budget holds.

        The first page that no longer fits ends the list, lest a smaller budget keep a page that a larger one does not.
        """
        ordered = best.sort(dim=1, descending=True).values
        pages = [_n_pages(size, others, self.page_size) for size, others in zip(sizes, protected, strict=True)]
        size, others, n_pages = torch.tensor([sizes, protected, pages]).to(best.device, non_blocking=True)
        heads = torch.arange(len(sizes), device=best.device).repeat_interleave(n_pages, output_size=sum(pages))
        number = torch.arange(len(heads), device=best.device) - (n_pages.cumsum(0) - n_pages)[heads]
        ends = self.page_size * (number + 1) - (others % self.page_size)[heads]  # a first page begins with others
        first = (ends - self.page_size).clamp(min=0)
        lengths = ends.minimum(size[heads]) - first
        price = ordered[heads, first]
        is_must = price == torch.inf  # the page of a layer's best pair, where the layer would be left empty
        turn = torch.where(first < self.min_kept_per_head, number, len(first)).masked_fill(is_must, -1)
        order = price.argsort(descending=True, stable=True)
        order = order[turn[order].argsort(stable=True)]
        fits = (lengths[order].cumsum(0) <= budget) | is_must[order]
        return torch.zeros_like(size).index_add_(0, heads[order], lengths[order] * fits)


def _n_pages(size: int, n_protected: int, page_size: int) -> int:
    """Returns on how many pages a head's ``size`` competing pairs lie, behind the protected ones."""
    return -(-(n_protected % page_size + size) // page_size) if size else 0
