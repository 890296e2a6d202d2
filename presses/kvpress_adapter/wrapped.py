"""The part of a wrapped press that the modules of the adapter need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.budget.scores import Scores
    from kvzip_press.prefilling.whole import Prefill


class WrappedPress(Protocol):
    """A press of kvpress and how it is run; its ``repr`` names it in errors.

    Attributes:
        press: kvpress's object, which is only read.
        is_scorer: Whether it only scores, and kvpress's own top-k does the rest.
        is_native: Whether it acts in a context of its own instead of layer by layer.
    """

    press: Any
    is_scorer: bool
    is_native: bool

    @property
    def scores_any_span(self) -> bool:
        """Whether it can score tokens after a context."""

    def prepared(self, model: nn.Module) -> Any:
        """Returns a copy of the press for one run on a model."""

    def score(self, prefill: Prefill) -> Scores:
        """Returns the press's scores, or the pairs that it kept."""
