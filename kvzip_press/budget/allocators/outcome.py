"""Allocations whose kept fraction is an outcome: a rule about the scores or the attention says what stays."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvzip_press.budget.allocators.base import Allocation
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Candidates, Counts
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Outcome(Allocation, ABC):
    """Base of allocations that take no amount: how much stays depends on the context.

    Every head keeps ``min_kept_per_head`` pairs, as far as it has them, and a layer without protected pairs at least
    one.
    """

    is_outcome: ClassVar[bool] = True

    @abstractmethod
    def kept(self, row: Candidates, layer_idx: int) -> torch.Tensor:
        """Returns how many unprotected pairs each head of a layer keeps, ``[heads]``, int64."""

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """Returns ``layer_idx -> [heads]``, int64: what the rule keeps, and the floors."""
        bare, counts = row.bare([(i, slice(None)) for i in row.heads]), {}
        for i, values in row.values.items():
            free = torch.tensor(row.free[i], device=values.device)
            kept = self.kept(row, i).maximum(free.clamp(max=self.min_kept_per_head))
            if i in bare and not bool(kept.any()):
                kept[int(values.amax(dim=1).argmax())] = 1
            counts[i] = kept.minimum(free)
        return counts


@dataclass(frozen=True)
class Threshold(Outcome):
    """Pairs stay whose score is at least a threshold: "threshold".

    As KVzap (https://arxiv.org/abs/2601.07891) and DMS (https://arxiv.org/abs/2506.05345) decide. What a threshold
    means depends on the scorer; it has no default. The same pairs stay in chunks as in the whole context, if the
    scores are the same. A lower threshold keeps a superset.

    Args:
        threshold: The least score that stays.
        min_kept_per_head: Pairs that every head keeps in any case, the best ones.
        safeguard: See :class:`Allocation`.

    Raises:
        InvalidArgumentError: The threshold is no finite number.
    """

    threshold: float = math.nan

    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.threshold
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
            raise InvalidArgumentError(
                f"expected threshold (the least score that stays) to be a finite number, got {given!r:.80}: "
                "Threshold(threshold=-4.0), or in a file {name: threshold, threshold: -4.0}"
            )

    def kept(self, row: Candidates, layer_idx: int) -> torch.Tensor:
        """Returns the number of scores at or above the threshold."""
        return (row.values[layer_idx] >= self.threshold).sum(dim=1)


@dataclass(frozen=True)
class AboveUniform(Outcome):
    """Pairs stay that get at least ``factor`` times as much attention as each would on average: "above_uniform".

    LeanKV (https://arxiv.org/abs/2412.03131, in later versions DiffKV) drops pairs so: those with less than
    ``factor / n``, n being the number of pairs that the attention is shared among. Storage "tiers:1/n" has the rule for
    the other border, between pairs in many and in few bits. Scores must be weights of attention; others are refused. A
    smaller factor keeps a superset.

    Args:
        factor: The least score that stays, in units of uniform attention, 0 or more. LeanKV's authors calibrate it for
            each model: 0.02 for Llama 3 8B, 0.04 for Qwen 2.5 7B, 0 (all stay) for larger models.
        min_kept_per_head: Pairs that every head keeps in any case, the best ones.
        safeguard: See :class:`Allocation`.

    Raises:
        InvalidArgumentError: The factor is not such a number.
    """

    factor: float = 0.02

    name: ClassVar[str] = "above_uniform"
    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.factor
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < math.inf:
            raise InvalidArgumentError(
                f"expected factor (of uniform attention, what stays has at least) to be a number of 0 or more, got "
                f"{given!r:.80}"
            )

    def kept(self, row: Candidates, layer_idx: int) -> torch.Tensor:
        """Returns the number of scores, which are in units of uniform attention, at or above the factor."""
        return (row.values[layer_idx] >= self.factor).sum(dim=1)


@dataclass(frozen=True)
class Tolerance(Outcome):
    """The shortest set of best pairs stays that keeps nearly all of what the last token looks at: "tolerance".

    ReFreeKV, https://arxiv.org/abs/2502.16886 (DBudgetKV at first). With ``p`` the last token's attention to the pairs
    that are not protected, a head keeps its ``k`` best pairs, by whatever scorer, for the least ``k`` with
    ``||p|| - ||p of these k|| <= tolerance * ||p||``. A smaller tolerance keeps a superset.

    The paper lets all heads of a layer keep the same number, by the mean norm over the heads (``per="layer"``). Ours
    decides for each KV head by itself (``per="head"``); a KV head's ``p`` is the largest in its group of query heads.
    The last token is that of the context, so a context that is read in chunks is refused.

    Args:
        tolerance: The relative loss of the norm that is allowed, in [0, 1); 0.05 in the authors' scripts.
        per: "head" (ours) or "layer" (as published, but for the reduction to KV heads).
        min_kept_per_head: Pairs that every head keeps in any case, the best ones.
        safeguard: See :class:`Allocation`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    tolerance: float = 0.05
    per: str = "head"

    name: ClassVar[str] = "tolerance"
    needs_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.tolerance
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < 1:
            raise InvalidArgumentError(f"expected tolerance (the loss allowed) in [0, 1), got {given!r:.80}")
        if self.per not in ("head", "layer"):
            raise InvalidArgumentError(f'expected per to be "head" or "layer", got {self.per!r:.80}')

    def kept(self, row: Candidates, layer_idx: int) -> torch.Tensor:
        """Returns the least number of best pairs that lose no more than the tolerance.

        Raises:
            InvalidArgumentError: The attention of the last token is not known.
        """
        if row.attention is None:
            raise InvalidArgumentError(
                f'expected the attention of a context\'s last token for allocation "{self.name}", got scores without '
                "it: read the context whole (`compress`, `prefill`, `with press(model):`), not in chunks"
            )
        values = row.values[layer_idx]
        order = values.argsort(dim=1, descending=True, stable=True)
        squares = row.attention[layer_idx].double().square().masked_fill(values == -torch.inf, 0).gather(1, order)
        norms = squares.cumsum(dim=1).sqrt()
        norms = torch.cat([torch.zeros_like(norms[:, :1]), norms], dim=1)
        if self.per == "layer":
            norms = norms.mean(dim=0, keepdim=True).expand_as(norms)
        lost = norms[:, -1:] - norms
        return (lost > self.tolerance * norms[:, -1:]).sum(dim=1)
