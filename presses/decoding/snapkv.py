"""SnapKV (Li et al. 2024, https://arxiv.org/abs/2404.14469), applied again and again while the model writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import avg_pool1d

from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.presses.decoding.windows import WindowPress


@dataclass(frozen=True)
class SnapKVDecodePress(WindowPress):
    """Keeps what the queries of the last tokens attend to, while decoding.

    A pair is worth the mean attention of the last ``window_size`` queries to it, averaged over the query heads of its
    group and over ``kernel_size`` neighbours in what its head still holds. The last ``window_size`` tokens stay, and
    count as neighbours without attention. SnapKV is about prompts; as the baseline of R-KV it is applied every
    ``buffer`` tokens, with a window of 8. Behind a prompt, the window begins anew.

    Args:
        window_size: Number of last queries, and of last tokens that stay (32, as for SnapKV's prompts).
        kernel_size: Width of the average over neighbours, an odd number (5).

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    by_layer: ClassVar[bool] = False

    window_size: int = field(default=32, kw_only=True)
    kernel_size: int = field(default=5, kw_only=True)

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns the window's mean attention, pooled over neighbours."""
        groups = pairs.queries.shape[1] // pairs.keys.shape[1]
        n_known = groups * pairs.known[:, -self.window_size :].sum(dim=-1).clamp(min=1)
        mean = (pairs.received(self.window_size) / n_known[:, None, None]).masked_fill(
            pairs.newest(self.window_size), 0
        )
        return avg_pool1d(mean, self.kernel_size, stride=1, padding=self.kernel_size // 2)
