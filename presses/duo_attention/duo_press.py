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
    """Keeps retrieval heads whole, and of streaming heads sink and recent tokens; see :class:`HeadPress`.

    ``compression_ratio`` is DuoAttention's sparsity, the fraction of streaming heads. Sink and window are those that
    its published patterns were trained with. Its streaming heads let go of older tokens while they decode; here the
    window is that of the context's end, and what comes after it stays.
    """

    n_sink: int = 128
    window_size: int = 256

    shipped: ClassVar[Path] = Path(__file__).parent / "data"

    @classmethod
    def of_pattern(cls, folder: str | PathLike[str], compression_ratio: float = 0.0) -> DuoAttentionPress:
        """The press of a pattern in DuoAttention's own format, with the sink and window that it names.

        Raises:
            InvalidArgumentError: A file is missing, or not what it should be.
        """
        scores, sink_size, recent_size = import_duo(folder)
        return cls(compression_ratio, scores, n_sink=sink_size, window_size=recent_size)
