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
    """Keeps the heads that KVzip finds important whole, and of the others the prefix; see :class:`HeadPress`.

    The paper advises a ratio of 0.4. Its code keeps what lies strictly above a threshold, which drops every head that
    ties with it: of scores with many ones (a head whose best pair gets all attention) it can keep none at all. Here the
    number is exact. A window is not in the paper, it is DuoAttention's (https://arxiv.org/abs/2410.10819);
    ``window_size=0`` is the paper.
    """

    shipped: ClassVar[Path] = Path(__file__).parent / "data"
