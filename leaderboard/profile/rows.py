"""Rows of a profile: one line of JSON for each cache that was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.rows.sealed_line import SealedLine, check_fractions
from kvzip_press.leaderboard.running import provenance as leaderboard

OURS, KVPRESS, DENSE = "ragged", "kvpress", "dense"
BASELINE = "none"  # the press that everything is compared with


@dataclass(frozen=True)
class ProfileRow(SealedLine):
    """The measurements of one cache. Times are wall seconds or milliseconds, sizes bytes; None if not measured.

    Attributes:
        model: The model's or the shape's name, as it was asked for.
        press: The press's registry name; "none" in a row without one.
        engine: "ragged" (ours), "kvpress" (its press run its own way) or "dense" (a plain DynamicCache).
        compression_ratio: The fraction of pairs asked to be removed.
        context_length: Tokens of the context.
        decode_tokens: Decode steps that were timed.
        prefill_seconds: The dense forward pass, with all that the press does while it runs.
        compress_seconds: Scoring and evicting after it.
        decode_ms_eager: Median milliseconds of a decode step of one row.
        decode_ms_graph: The same in a CUDA graph.
        decode_ms_compiled: The same, compiled.
        turns: "eager", "graph" or "compiled" -> the spread of that figure, and the gain over the cache that it was
            timed in turns with: the fields of `Turns`. Empty in rows of older versions, which timed each cache alone.
        resident_bytes: What the compressed cache holds.
        dense_bytes: What the uncompressed cache would hold.
        peak_prefill_bytes: Most GPU memory beyond the weights while the context was read.
        peak_compress_bytes: The same while it was compressed, the cache included.
        kept_fraction: Pairs kept over pairs seen, of the layers that can be compressed.
        storage: The name of how the kept pairs are stored.
        notes: Figure -> why it is missing.
        error: Why the whole row has no figures.
        provenance: Versions, device, dtype, commit, date.

    Raises:
        InvalidArgumentError: A field is of another type, or not finite.
    """

    kind: ClassVar[str] = "a row of a profile"

    model: str
    press: str
    engine: str
    compression_ratio: float
    context_length: int
    decode_tokens: int
    prefill_seconds: float | None = None
    compress_seconds: float | None = None
    decode_ms_eager: float | None = None
    decode_ms_graph: float | None = None
    decode_ms_compiled: float | None = None
    turns: dict[str, dict[str, float | None]] = field(default_factory=dict)
    resident_bytes: int | None = None
    dense_bytes: int | None = None
    peak_prefill_bytes: int | None = None
    peak_compress_bytes: int | None = None
    kept_fraction: float | None = None
    storage: str = "model"
    notes: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name that tables use."""
        ours = self.press if self.storage == "model" else f"{self.press}, {self.storage}"
        return {OURS: ours, KVPRESS: f"{self.press} (kvpress)", DENSE: "DynamicCache"}[self.engine]

    @property
    def is_baseline(self) -> bool:
        """Whether it is the ragged cache with everything kept, as the model made it."""
        return self.engine == OURS and self.press == BASELINE and self.storage == "model"

    def check(self) -> None:
        """Raises InvalidArgumentError for an engine that is not known or a ratio out of range."""
        if self.engine not in (OURS, KVPRESS, DENSE):
            raise InvalidArgumentError(
                f"expected {self.kind} with an engine out of {OURS}, {KVPRESS} and {DENSE}, got {self.engine!r:.80}"
            )
        check_fractions(self.kind, compression_ratio=self.compression_ratio)


def provenance(model: Any) -> dict[str, str]:
    """Returns what a measurement depends on besides its row: versions, device, dtype, commit, date."""
    return {**leaderboard.provenance(model), "date": datetime.now(UTC).isoformat(timespec="seconds")}
