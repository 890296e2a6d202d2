"""DuoAttention (https://arxiv.org/abs/2410.10819): retrieval heads keep the context, streaming heads its two ends."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import ClassVar

from kvzip_press.heads.press import HeadPress
from kvzip_press.presses.duo_attention.pattern import import_duo


@dataclass(frozen=True)
class DuoAttentionPress(HeadPress):
    """Keeps retrieval heads whole, and only sink and recent tokens of streaming heads; see :class:`HeadPress`.

    ``compression_ratio`` is DuoAttention's sparsity, the fraction of streaming heads. The default sink and window are
    those that its published patterns were trained with. DuoAttention's streaming heads drop older tokens while
    decoding; here the window is the end of the context, and tokens after the context are all kept.
    """

    n_sink: int = 128
    window_size: int = 256

    shipped: ClassVar[Path] = Path(__file__).parent / "data"

    @classmethod
    def of_pattern(cls, folder: str | PathLike[str], compression_ratio: float = 0.0) -> DuoAttentionPress:
        """Makes the press of a pattern in DuoAttention's own format, with the pattern's sink and window.

        Raises:
            InvalidArgumentError: A file is missing or malformed.
        """
        scores, sink_size, recent_size = import_duo(folder)
        return cls(compression_ratio, scores, n_sink=sink_size, window_size=recent_size)
