"""Head-level KVzip (https://arxiv.org/abs/2505.23416): whole heads lose their context, and no context is ever scored.

``S[l, h] = max over a text's tokens of KVzip's score of the pair (l, h, token)``, once per model; the best
``round((1 - compression_ratio) * L * H)`` heads keep every pair of the context, the others keep its protected prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvzip_press.heads.press import HeadPress


@dataclass(frozen=True)
class KVzipHeadPress(HeadPress):
    """Keeps whole the heads that KVzip finds important, and only the prefix of the others; see :class:`HeadPress`.

    The paper advises a ratio of 0.4. Its code keeps heads strictly above a threshold, and so drops every head that ties
    with it: if many scores are 1 (a head whose best pair gets all attention) it may keep no head at all. Here the
    number is exact. The window is not in the paper but comes from DuoAttention (https://arxiv.org/abs/2410.10819);
    ``window_size=0`` is the paper's method.
    """

    shipped: ClassVar[Path] = Path(__file__).parent / "data"
