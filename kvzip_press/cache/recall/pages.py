"""Quest (arXiv 2406.10774): groups are pages of neighbours, ranked by a bound of what the query's product can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvzip_press.cache.recall.policy import Recall
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class PageRecall(Recall):
    """Groups neighbours, and ranks a page by the largest product that the query could have with a key in its bounds.

    These are the least and the greatest value of each channel: two vectors a page, where a cluster has one.

    Args:
        page_size: Pairs of a page; the last one of a head may have fewer.
    """

    page_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_size < 1:
            raise InvalidArgumentError(f"expected a page_size of 1 or more, got {self!r}")

    def groups(self, keys: torch.Tensor, *, are_new: bool) -> torch.Tensor:
        """Returns the page of each pair."""
        return torch.arange(len(keys), device=keys.device) // self.page_size

    def marks(self, keys: torch.Tensor, groups: torch.Tensor, n_groups: int) -> torch.Tensor:
        """Returns the greatest and the least value of each channel of each page, ``[n_groups, 2 * head_dim]``."""
        index = groups[:, None].expand_as(keys)
        bounds = keys.new_zeros(n_groups, keys.shape[1])
        high, low = (bounds.scatter_reduce(0, index, keys, kind, include_self=False) for kind in ("amax", "amin"))
        return torch.cat([high, low], -1)
