"""What a press is: hyper-parameters that name a scorer and a policy. It holds no state of any run."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvzip_press.budget.allocators import SAFEGUARD, Allocation
from kvzip_press.budget.amount import Amount, LayerRatios, amount_of
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.prefilling.whole import Observer, Prefill
from kvzip_press.session import compressing

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.decoding.eviction import DecodeEviction, Schedule


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
        _ = self.policy  # raises for values out of range

    @property
    def amount(self) -> Amount:
        """How much is kept, by the fields."""
        return amount_of(self.compression_ratio, self.budget)

    @property
    def policy(self) -> Policy:
        """How much is kept and how pairs compete for it, by the fields: what :meth:`score` hands on."""
        return Policy(self.amount)

    @abstractmethod
    def score(self, prefill: Prefill) -> Scores:
        """Scores every pair of the prefill's span. The prefill and its cache are not changed."""

    def observer(self, model: nn.Module) -> Observer | None:
        """For scorers that need to see the prefill run (hidden states, queries): a fresh observer. None otherwise."""
        return None

    @property
    def schedule(self) -> Schedule | None:
        """When pairs are evicted while the model writes; None where none are."""
        return None

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether pairs are evicted while the model writes, too."""
        return self.schedule is not None

    def requires(self, model: nn.Module) -> None:  # noqa: B027  # most presses need nothing
        """Looks for what the press needs for a model beside its weights: gates, scores of heads.

        Raises:
            InvalidArgumentError: Something is missing, or does not fit the model. The message says how to get it.
        """

    def decode_eviction(self, model: nn.Module) -> DecodeEviction | None:
        """What evicts while the model writes, for one ``with press(model):``; None where nothing does."""
        return None

    def __call__(self, model: Any) -> AbstractContextManager[None]:
        """Compresses every prefill of ``model`` inside the context, in place in the cache the model used.

        Raises:
            UnsupportedModelError: The model has no layer that can be compressed.
        """
        return compressing(self, model)


def _within_budget(score: Callable[[Any, Prefill], Scores]) -> Callable[[Any, Prefill], Scores]:
    @functools.wraps(score)
    def scored(self: Press, prefill: Prefill) -> Scores:
        scores = score(self, prefill)
        return scores if self.budget is None else scores.asked_for(budget=self.budget)

    return scored


@dataclass(frozen=True)
class AllocatingPress(Press):
    """A press that leaves to its user how pairs compete for the budget.

    Args:
        compression_ratio: Fraction of key/value pairs removed, in [0, 1).
        allocation: "global" (all pairs of all layers and heads compete), "layer" (every layer keeps the same part, its
            heads compete), "head" (every head keeps the same part), "adakv" (as "layer", with a safeguard), or an
            :class:`kvzip_press.budget.allocators.Allocation`, which brings its own floors.
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

    allocation: str | Allocation = "global"
    layer_ratios: Mapping[int, float] | Sequence[float] | None = field(default=None, kw_only=True)
    safeguard: float = field(default=SAFEGUARD, kw_only=True)
    min_kept_per_head: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.layer_ratios is not None:
            object.__setattr__(self, "layer_ratios", LayerRatios(self.layer_ratios))
        super().__post_init__()

    @property
    def policy(self) -> Policy:
        """How much is kept and how pairs compete for it, by the fields."""
        return Policy.of(
            self.compression_ratio,
            self.allocation,
            budget=self.budget,
            layer_ratios=self.layer_ratios,
            safeguard=self.safeguard,
            min_kept_per_head=self.min_kept_per_head,
        )

    @property
    def amount(self) -> Amount:
        """How much is kept, by the fields."""
        return self.policy.amount


@dataclass(frozen=True)
class ObservingPress(Press):
    """A press whose scores come from watching the prefill."""

    @abstractmethod
    def observer(self, model: nn.Module) -> Observer:
        """A fresh observer of one prefill."""

    def score(self, prefill: Prefill) -> Scores:
        """The scores of the observer that watched this prefill, or of one that watches it run once more."""
        return prefill.observed(self).scores(prefill)
