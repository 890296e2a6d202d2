"""Combines several presses: each chooses among the pairs that the presses before it kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from kvzip_press.arguments.press import as_press
from kvzip_press.budget.allocators import Decided
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.watching import Watcher
from kvzip_press.prefilling.whole import Observer, Prefill, Scorer
from kvzip_press.press import Press

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class ComposedPress(Press):
    """Applies presses in order to one prefill: a pair is kept if all of them keep it.

    The first press selects as it would alone. The second spends its own budget only among the pairs that the first
    kept: its ratio is a fraction of these pairs, so ratios of 0.5 and 0.5 leave a quarter, and a budget in tokens or a
    floor is filled as far as they go. Further presses continue in the same way. Every press scores the same dense
    prefill. Each press protects its own positions: a position that only an earlier press protects can be lost to a
    later one; only what all of them protect is kept by every head. A budget in tokens counts what earlier turns left,
    as it does for that press alone.

    A ComposedPress among the presses is replaced by its own presses, in order. Pairs are stored as the composition
    says; if it says nothing, as those presses do that name a storage.

    Args:
        presses: The presses, at least one; those of kvpress are wrapped in a RaggedPress. A press that decides itself
            how many pairs each head keeps (``is_scorer`` is False, as for kvpress's AdaKV) can only come first, because
            its decision is about all pairs.

    Attributes:
        compression_ratio: The ratio that the presses' ratios amount to together; those with a budget or layer ratios
            are left out.

    Raises:
        InvalidArgumentError: There is no press, an item is not a press, a press that decides its own counts is not the
            first, or two name different storages.
    """

    presses: Sequence[Press]
    compression_ratio: float = field(init=False, default=0.0)
    budget: int | None = field(init=False, default=None)

    is_scorer = False

    def __post_init__(self) -> None:
        presses = tuple(_flat(self.presses))
        if not presses:
            raise InvalidArgumentError("expected at least one press to compose, got none")
        for i, press in enumerate(presses[1:], start=1):
            if not press.is_scorer:
                raise InvalidArgumentError(
                    f"expected presses that follow a budget after the first, got one at {i} that decides its own "
                    f"counts over all pairs: {press!r}; put it first"
                )
        storages = {self.storage, *(press.storage for press in presses)} - {"model"}
        if len(storages) > 1:
            raise InvalidArgumentError(f"expected presses that name one storage, got {sorted(storages)}")
        object.__setattr__(self, "storage", next(iter(storages), "model"))
        ratios = [_ratio(press) for press in presses]
        object.__setattr__(self, "presses", presses)
        object.__setattr__(
            self, "compression_ratio", 1 - math.prod(1 - ratio for ratio in ratios if not math.isnan(ratio))
        )
        super().__post_init__()

    def requires(self, model: nn.Module) -> None:
        """Raises InvalidArgumentError if something is missing that one of the presses needs for a model."""
        for press in self.presses:
            press.requires(model)

    def observer(self, model: nn.Module) -> Observers | None:
        """Returns the observers of all presses that have one, combined; None if none has."""
        by_press: dict[Scorer, Observer] = {
            press: observer for press in self.presses if (observer := press.observer(model)) is not None
        }
        return Observers(self, by_press) if by_press else None

    def score(self, prefill: Prefill) -> Scores:
        """Returns what the presses kept, as decided counts and scores that put the kept pairs first.

        Scores hold one score per pair and one policy, but a composition has several. So its result is decided here:
        kept pairs have the last press's score, all others the lowest finite number, and the policy's counts say how
        many are kept. No other ratio can be asked of it.

        Raises:
            InvalidArgumentError: A press after the first turned out to have scores for its own counts only.
        """
        watched = prefill.observers.get(self)
        if isinstance(watched, Observers):
            prefill.observers.update(watched.by_press)
        return self.composed(prefill)

    def composed(self, prefill: Prefill) -> Scores:
        """Returns the scores; the presses' observers are the prefill's, or watch it run again."""
        scores = self.presses[0].score(prefill)
        keep = select(prefill.attended(scores), prefill.valid, held=prefill.held_pairs(scores))
        protected = scores.protected
        for press in self.presses[1:]:
            scores = press.score(prefill)
            keep = select(prefill.attended(scores), prefill.valid, among=keep, held=prefill.held_pairs(scores))
            protected = protected & scores.protected
        layers = {
            layer_idx: torch.where(keep[layer_idx], values.float().clamp(min=LOWEST / 2), LOWEST)
            for layer_idx, values in scores.layers.items()
        }
        free = (prefill.valid & ~protected).unsqueeze(1)
        counts = {layer_idx: (kept & free.to(kept.device)).sum(dim=-1) for layer_idx, kept in keep.items()}
        return Scores(layers, protected, Policy(self.amount, Decided(per_head=counts, like="global")))


class Observers(Watcher):
    """The observers of a composition's presses, all of which watch the same forward.

    Args:
        press: The composition.
        by_press: Its presses' observers.
    """

    def __init__(self, press: ComposedPress, by_press: dict[Scorer, Observer]) -> None:
        self._press, self.by_press = press, by_press

    def _watch(self, stack: ExitStack) -> None:
        for observer in self.by_press.values():
            stack.enter_context(observer)

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the scores of the prefill that was observed."""
        prefill.observers.update(self.by_press)
        return self._press.composed(prefill)


def _ratio(press: Press) -> float:
    """Returns a press's ratio, NaN if it has none."""
    ratio: object = press.compression_ratio
    if isinstance(ratio, (int, float)):
        return float(ratio)
    raise InvalidArgumentError(f"expected {type(press).__name__}.compression_ratio to be a number, got {ratio!r}")


def _flat(presses: object) -> Iterator[Press]:
    if not isinstance(presses, Sequence) or isinstance(presses, str):
        raise InvalidArgumentError(f"expected a sequence of presses, got {type(presses).__name__}")
    for given in presses:
        press = as_press(given)
        if isinstance(press, ComposedPress):
            yield from press.presses
        elif isinstance(press, Press):
            yield press
        else:
            raise InvalidArgumentError(f"expected presses, got {type(press).__name__}")
