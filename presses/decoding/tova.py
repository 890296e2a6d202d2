"""TOVA (Oren et al. 2024, https://arxiv.org/abs/2401.06104): what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.presses.decoding.windows import RecentPress


@dataclass(frozen=True)
class TOVADecodePress(RecentPress):
    """Keeps the tokens that the last token attends to most, while decoding.

    A token is worth the attention of the last query, averaged over all query heads of the layer, so all KV heads of a
    layer rank tokens alike, and keep the same ones under "head". A head that has lost a token, under another
    allocation, counts as one that does not attend to it.

    With ``buffer=1`` that is the paper's: one token goes at each step. With more, only the last of ``buffer`` queries
    has a say.

    Args:
        n_recent: Number of last tokens that no eviction takes. The paper has 0; 1 is kvpress's rule.

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: ``n_recent`` is negative, or no less than the budget.
    """

    by_layer: ClassVar[bool] = False

    @property
    def n_queries(self) -> int:
        """The last one."""
        return 1

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns the last query's attention to the pairs' tokens, the mean over all query heads."""
        of_heads = pairs.received(1)
        first = pairs.positions.masked_fill(~pairs.valid, torch.iinfo(torch.int64).max).amin()
        token = (pairs.positions - first).clamp(min=0)  # heads may hold different tokens: they meet by position
        sums = of_heads.new_zeros(len(token), int(token.max()) + 1)
        sums.scatter_add_(1, token.flatten(1), of_heads.flatten(1))
        return (sums / pairs.queries.shape[1]).gather(1, token.flatten(1)).view_as(of_heads)
