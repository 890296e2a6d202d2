"""What a calibration found, and for what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvzip_press.errors import CacheMismatchError
from kvzip_press.model.structure import text_decoder
from kvzip_press.model.weights import weights_fingerprint

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.press import Press


@dataclass(frozen=True)
class Step:
    """One ratio in one storage, as it was tested.

    Attributes:
        compression_ratio: Fraction of pairs removed.
        storage: How kept pairs were stored.
        n_changed: Contexts with a changed answer; once there were too many, no further context was looked at.
        n: Contexts that were looked at.
        resident_fraction: Resident bytes divided by dense bytes, over these contexts.
        passed: Whether its rate of changed answers is bounded.
    """

    compression_ratio: float
    storage: str
    n_changed: int
    n: int
    resident_fraction: float
    passed: bool


@dataclass(frozen=True)
class Certificate:
    """A bound on how many answers a press changes, for contexts and questions like those that it was calibrated on.

    With the probability ``confidence`` over the draw of the prompts, at most ``max_loss`` of all contexts have an
    answer that differs from that of the full cache. The rate that was seen, ``n_changed / n``, is smaller, because it
    has to be.

    Attributes:
        max_loss: The bound.
        confidence: The probability.
        n: Number of contexts.
        n_questions: Number of questions about them.
        n_changed: Contexts with an answer that changed.
        press: The press, in short.
        compression_ratio: Fraction of pairs removed; 0.0 if no larger one was bounded.
        storage: How kept pairs are stored.
        resident_fraction: Resident bytes divided by dense bytes.
        max_new_tokens: The most tokens of an answer that were compared.
        date: When it was made, UTC, in ISO 8601.
        model: Fingerprint of the model's weights.
        steps: All that was tested, in order.
    """

    max_loss: float
    confidence: float
    n: int
    n_questions: int
    n_changed: int
    press: str
    compression_ratio: float
    storage: str
    resident_fraction: float
    max_new_tokens: int
    date: str
    model: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return (
            f"{self.press}: at most {self.max_loss:.2%} of contexts with a changed answer, with {self.confidence:.1%} "
            f"confidence ({self.n_changed} of {self.n} changed, {self.n_questions} questions, {self.date}); "
            f"{self.resident_fraction:.1%} of the bytes"
        )

    def check(self, model: nn.Module) -> None:
        """Raises CacheMismatchError unless the model's weights are those that the certificate is about."""
        got = weights_fingerprint(text_decoder(model))
        if got != self.model:
            raise CacheMismatchError(
                f"expected the model that this certificate is about, {self.model}, got {got}: other weights or adapters"
            )


class Calibration(NamedTuple):
    """A press, and what is known of it.

    Attributes:
        press: The press with the ratio and the storage that were chosen.
        certificate: What they were chosen by.
    """

    press: Press
    certificate: Certificate
