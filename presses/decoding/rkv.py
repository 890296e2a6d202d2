"""R-KV (Cai et al. 2025, https://arxiv.org/abs/2505.24133): what is important and not redundant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import max_pool1d

from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.near_duplicates import near_duplicates
from kvzip_press.presses.decoding.windows import WindowPress

NUMBERS_AT_ONCE = 2**26  # of the keys that are in memory in fp32 at a time: 256 MB, beside two temporaries as large


@dataclass(frozen=True)
class RKVPress(WindowPress):
    """Keeps pairs that recent queries attend to and that do not say what a newer pair says, while decoding.

    A pair is worth ``lam * I - (1 - lam) * R`` in its head:

    - I, importance: of the last ``window_size`` queries, the largest logit over the group's query heads, softmax over
      all pairs but those of these last tokens, the mean over the queries, the largest of ``kernel_size`` neighbours.
    - R, redundancy: with C the cosines between all keys of the head, 0 on the diagonal; in each row the newest pair
      with a cosine above ``threshold`` is set to 0, so that the newest of near-duplicates is spared; the softmax over
      pairs of C's column means.

    The last ``window_size`` tokens stay. Everything is fp32, row by row of a batch, and C is never whole in memory.
    Three things of the authors' code are not followed: it computes in the keys' dtype and for the first row of a batch
    only, and a row without any cosine above the threshold sets pair 0 to 0.

    Args:
        lam: Weight of importance, lambda (0.07, as in the authors' code; 0.1 in their text).
        window_size: Number of last queries, and of last tokens that stay, alpha (8).
        kernel_size: Width of the maximum over neighbours, an odd number (7).
        threshold: Cosine from which on two keys say the same (0.5).

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    by_layer: ClassVar[bool] = False

    lam: float = field(default=0.07, kw_only=True)
    window_size: int = field(default=8, kw_only=True)
    kernel_size: int = field(default=7, kw_only=True)
    threshold: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise InvalidArgumentError(f"RKVPress: expected lam in [0, 1], got {self.lam}")
        super().__post_init__()

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns importance less redundancy."""
        return self.lam * self.importance(pairs) - (1 - self.lam) * self.redundancy(pairs)

    def importance(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns I, ``[batch, num_key_value_heads, n]``; what it is for the window's own pairs does not matter."""
        older = ~pairs.newest(self.window_size)
        total = torch.zeros_like(pairs.scores)
        for logits, sees in pairs.logits(self.window_size, among=older):
            total += logits.amax(dim=2).softmax(dim=-1).where(sees[:, :, 0], 0).sum(dim=2)
        n_known = pairs.known[:, -self.window_size :].sum(dim=-1).clamp(min=1)
        mean = total / n_known[:, None, None]
        return max_pool1d(mean, self.kernel_size, stride=1, padding=self.kernel_size // 2)

    def redundancy(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns R, ``[batch, num_key_value_heads, n]``."""
        keys, valid = pairs.keys, pairs.valid
        newest = near_duplicates(keys, valid, self.threshold)
        n_rows = max(NUMBERS_AT_ONCE // max(keys[:1].numel(), 1), 1)
        sums = torch.cat(
            [
                _column_sums(*rows)
                for rows in zip(*(whole.split(n_rows) for whole in (keys, valid, newest)), strict=True)
            ]
        )
        means = sums / valid.sum(dim=-1, keepdim=True).clamp(min=1)
        return means.masked_fill(~valid, -torch.inf).softmax(dim=-1)


def _column_sums(keys: torch.Tensor, valid: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """Returns the sums of C's columns, fp32 ``[batch, num_key_value_heads, n]``; of columns without a pair, 0.

    A column sums to its key's product with the sum of all keys, less its own; only which pair is the newest like each
    (``newest``, or -1) has to be looked for among all cosines.
    """
    keys = keys.masked_fill(~valid[..., None], 0)
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=-1)
    scales = norms.clamp(min=1e-12).reciprocal_()  # keys are never divided by their norms: that would be a pass more
    total = scales.unsqueeze(2) @ wide
    sums = (wide @ total.mT).squeeze(-1) * scales - (norms * scales) ** 2
    found = newest.clamp(min=0)
    spared = wide.gather(2, found.unsqueeze(-1).expand_as(wide)).mul_(wide).sum(dim=-1)
    spared *= scales * scales.gather(2, found)
    return sums.scatter_add_(2, found, -spared.masked_fill_(newest < 0, 0)).float()
