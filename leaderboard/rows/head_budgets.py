"""What every head of a compressed cache kept: one line of JSON for each cache that answered."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.rows.results import read_lines


@dataclass(frozen=True)
class HeadBudgets:
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
    """

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

    def to_json(self) -> str:
        """Returns one line of JSON, without the newline; fractions have four decimals."""
        return json.dumps({**asdict(self), "kept": [[round(part, 4) for part in heads] for heads in self.kept]})

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads a line; fields that a newer version may have added are ignored.

        Raises:
            InvalidArgumentError: Not a JSON object, or fields are missing.
        """
        try:
            values: dict[str, Any] = json.loads(line)
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            kept = tuple(tuple(heads) for heads in known["kept"])
            return cls(**{**known, "kept": kept, "layer_idx": tuple(known["layer_idx"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidArgumentError(f"expected head budgets in JSON, got {line[:80]!r} ({error})") from error


def read_heads(path: str | os.PathLike[str]) -> Iterator[HeadBudgets]:
    """Yields the head budgets of a file in order, see :func:`kvzip_press.leaderboard.rows.results.read_lines`."""
    return read_lines(path, HeadBudgets.from_json)
