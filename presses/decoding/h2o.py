"""H2O (Zhang et al. 2023, https://arxiv.org/abs/2306.14048): heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding.decode_press import DecodePress


@dataclass(frozen=True)
class H2OPress(DecodePress):
    """Keeps the pairs that have got most attention so far, and the newest ones, while decoding.

    A pair is worth the sum of the probabilities with which all queries since it was written attended to it, those of
    the prompt included; the sum over the query heads of its group. Sums are fp32 and not divided by a pair's age, so
    early tokens lead, as in the paper. Half the budget is for heavy hitters, half for recent tokens.

    With ``buffer=1`` that is the paper's: one pair goes at each step. With ``buffer=128`` the queries of the tokens
    since the last eviction are kept, and their probabilities are computed at once. They are those with which the model
    attended, since nothing went in between; so the difference is only that pairs go 128 at a time, after 128 more
    tokens had a chance to attend to them. What tokens outside of ``with press(model):`` attend to is not counted before
    the press has met the cache, and what a press for the prompt keeps begins at 0.

    Args:
        recent_fraction: Part of the budget that is for the newest tokens (0.5), in [0, 1).

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: The fraction is out of range.
    """

    by_layer: ClassVar[bool] = False

    recent_fraction: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.recent_fraction < 1:
            raise InvalidArgumentError(f"H2OPress: expected recent_fraction in [0, 1), got {self.recent_fraction}")
        super().__post_init__()

    @property
    def recent(self) -> int:
        """The part of the budget that is for the newest tokens, rounded down."""
        return int(self.recent_fraction * (self.budget or 0))

    @property
    def n_queries(self) -> None:
        """All since the last eviction."""

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns what pairs carry and what they have got since."""
        return pairs.scores + pairs.received()
