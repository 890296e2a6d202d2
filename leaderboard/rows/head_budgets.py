"""What every head of a compressed cache kept: one line of JSON for each cache that answered."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.rows.line_file import read_lines
from kvzip_press.leaderboard.rows.sealed_line import SealedLine, check_fractions


@dataclass(frozen=True)
class HeadBudgets(SealedLine):
    """The kept fractions of one context under one press and ratio.

    Attributes:
        run_id: The run.
        task: The task's name.
        sample_id: The context.
        press: The press's label.
        compression_ratio: The fraction of pairs asked to be removed.
        layer_idx: The layers that can be compressed.
        kept: ``[layer][kv head]``, kept pairs over the context's tokens, in [0, 1]; layers as in ``layer_idx``.
        question_id: The question that was compressed with the context, in a query-aware run; else empty.

    Raises:
        InvalidArgumentError: A field is of another type, or not finite.
    """

    kind: ClassVar[str] = "head budgets"

    run_id: str
    task: str
    sample_id: str
    press: str
    compression_ratio: float
    layer_idx: tuple[int, ...]
    kept: tuple[tuple[float, ...], ...]
    question_id: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        """Identifies the cache within its run."""
        return self.task, self.sample_id, self.question_id, self.press, self.compression_ratio

    def check(self) -> None:
        """Raises InvalidArgumentError for fractions outside 0..1, or other than one list of heads for each layer."""
        check_fractions(self.kind, compression_ratio=self.compression_ratio)
        if len(self.layer_idx) != len(self.kept):
            raise InvalidArgumentError(
                f"expected {self.kind} of as many layers as layer_idx has, {len(self.layer_idx)}, got {len(self.kept)}"
            )
        for part in (part for heads in self.kept for part in heads):
            check_fractions(self.kind, kept=part)

    def _values(self) -> dict[str, Any]:
        return {**asdict(self), "kept": [[round(part, 4) for part in heads] for heads in self.kept]}


def read_heads(path: str | os.PathLike[str]) -> Iterator[HeadBudgets]:
    """Yields the head budgets of a file in order, with fractions of four decimals; see `read_lines`."""
    return read_lines(path, HeadBudgets)
