"""What a press is: hyper-parameters that name a scorer and a policy. It holds no state of any run."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kvzip_press.budget.policy import SAFEGUARD, LayerRatios, check_amount, check_policy
from kvzip_press.budget.scores import Scores

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.decoding.eviction import DecodeEviction
    from kvzip_press.prefilling.whole import Prefill


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
        budget: Instead of a ratio: how many tokens' worth of pairs a row keeps, an int of at least 1. A head keeps that
            many on average over its pool, so a row keeps ``budget * heads * layers``, protected pairs among them where
            the press counts these inside (``protected_count``), else on top. A shorter context is not compressed. With
            later turns it is a budget over the total: what a row still holds of earlier turns, and the tokens between
            them, which all stay, are taken off, and the new turn gets the rest (at least one pair a layer). So it
            bounds a whole conversation; one that outgrows it keeps next to nothing of its last turn.

    Raises:
        InvalidArgumentError: A value out of range, or a ratio and a budget.
    """

    compression_ratio: float = 0.0
    budget: int | None = field(default=None, kw_only=True)

    #: Whether it only scores, and the core spends its budget. False: it decides itself how many pairs each head keeps.
    is_scorer = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "score" in cls.__dict__:  # a scorer need not know of budgets, and none can forget one
            setattr(cls, "score", _within_budget(cls.score))  # noqa: B010  # mypy: a method is not assigned to

    def __post_init__(self) -> None:
        check_amount(self.compression_ratio, self.budget)

    @property
    def policy(self) -> dict[str, Any]:
        """What the fields say about the budget, as arguments of :class:`kvzip_press.budget.scores.Scores`."""
        return {"compression_ratio": self.compression_ratio, "budget": self.budget}

    @abstractmethod
    def score(self, prefill: Prefill) -> Scores:
        """Scores every pair of the prefill's span. The prefill and its cache are not changed."""

    def observer(self, model: nn.Module) -> Observer | None:
        """For scorers that need to see the prefill run (hidden states, queries): a fresh observer. None otherwise."""
        return None

    def decode_eviction(self, model: nn.Module) -> DecodeEviction | None:
        """What evicts while the model writes, for one ``with press(model):``; None where nothing does."""
        return None

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        """Compresses every prefill of ``model`` inside the context, in place in the cache the model used.

        Raises:
            UnsupportedModelError: The model has no layer that can be compressed.
        """
        from kvzip_press.session import compressing

        return compressing(self, model)


def _within_budget(score: Callable[[Any, Prefill], Scores]) -> Callable[[Any, Prefill], Scores]:
    @functools.wraps(score)
    def scored(self: Press, prefill: Prefill) -> Scores:
        scores = score(self, prefill)
        return scores if self.budget is None else scores.with_budget(self.budget)

    return scored


@dataclass(frozen=True)
class AllocatingPress(Press):
    """A press that leaves to its user how pairs compete for the budget.

    Args:
        compression_ratio: Fraction of key/value pairs removed, in [0, 1).
        allocation: "global" (all pairs of all layers and heads compete), "layer" (every layer keeps the same part, its
            heads compete), "head" (every head keeps the same part), or "adakv" (as "layer", with a safeguard).
        budget: Tokens' worth of pairs kept instead of a ratio, see :class:`Press`.
        layer_ratios: Instead of one ratio: each layer's own, by layer index, as a mapping or a sequence; for all layers
            that can be compressed, and no others. Not with allocation "global".
        safeguard: Of "adakv": the part of its equal share (the layer's unprotected pairs over its heads, rounded down)
            that every head keeps, in [0, 1]; AdaKV's alpha.
        min_kept_per_head: Unprotected pairs that every head keeps, inside the budget, as far as its context and the
            budget go: one too small for all these floors is spent on heads in turns, one pair each, the better first.

    Raises:
        InvalidArgumentError: A value out of range, or more than one of ratio, budget and layer ratios.
    """

    allocation: str = "global"
    layer_ratios: Mapping[int, float] | Sequence[float] | None = field(default=None, kw_only=True)
    safeguard: float = field(default=SAFEGUARD, kw_only=True)
    min_kept_per_head: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.layer_ratios is not None:
            object.__setattr__(self, "layer_ratios", LayerRatios(self.layer_ratios))
        check_policy(**self.policy)

    @property
    def policy(self) -> dict[str, Any]:
        """All that the fields say about the budget."""
        names = ("allocation", "layer_ratios", "safeguard", "min_kept_per_head")
        return {**super().policy, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class ObservingPress(Press):
    """A press whose scores come from watching the prefill."""

    @abstractmethod
    def observer(self, model: nn.Module) -> Observer:
        """A fresh observer of one prefill."""

    def score(self, prefill: Prefill) -> Scores:
        """The scores of the observer that watched this prefill, or of one that watches it run once more."""
        return prefill.observed(self).scores(prefill)
