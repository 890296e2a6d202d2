"""What a press is: hyper-parameters that name a scorer and a policy. It holds no state of any run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvzip_press.budget import check_compression_ratio
from kvzip_press.scores import Scores

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.prefilling import Prefill


class Observer(Protocol):
    """Looks at one prefill forward as it runs, without touching it, and scores from what it saw."""

    def __enter__(self) -> Observer: ...

    def __exit__(self, *exc: object) -> None: ...

    def scores(self, prefill: Prefill) -> Scores:
        """The scores of the prefill that was observed."""


@dataclass(frozen=True)
class Press(ABC):
    """A KV-cache compression method.

    ``with press(model):`` compresses the cache at the end of every prefill inside, ``model.generate`` included.

    Args:
        compression_ratio: Fraction of key/value pairs removed, in [0, 1).
    """

    compression_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_compression_ratio(self.compression_ratio)

    @abstractmethod
    def score(self, prefill: Prefill) -> Scores:
        """Scores every pair of the prefill's span. The prefill and its cache are not changed."""

    def observer(self, model: nn.Module) -> Observer | None:
        """For scorers that need to see the prefill run (hidden states, queries): a fresh observer. None otherwise."""
        return None

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        """Compresses every prefill of ``model`` inside the context, in place in the cache the model used.

        Raises:
            UnsupportedModelError: The model has no layer that can be compressed.
        """
        from kvzip_press.hooks import compressing

        return compressing(self, model)


@dataclass(frozen=True)
class ObservingPress(Press):
    """A press whose scores come from watching the prefill."""

    @abstractmethod
    def observer(self, model: nn.Module) -> Observer:
        """A fresh observer of one prefill."""

    def score(self, prefill: Prefill) -> Scores:
        """The scores of the observer that watched this prefill, or of one that watches it run once more."""
        return prefill.observed(self).scores(prefill)
