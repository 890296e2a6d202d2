"""The storage "tiers": important pairs in more bits than the others of the same head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.held import POSITIONS, NewPairs
from kvzip_press.cache.codecs.int4 import Int4Rows
from kvzip_press.cache.codecs.k8v4 import K8V4Rows
from kvzip_press.cache.codecs.parted import FIRST, SINKS, Parted
from kvzip_press.cache.codecs.storage import Shapes, Storage
from kvzip_press.errors import InvalidArgumentError

HIGH, LOW, IS_HIGH = "high", "low", "is_high"


@dataclass(frozen=True)
class K4V2Rows(Int4Rows):
    """Stores a key in 4 bits, centred and rotated as in int4, and a value in 2."""

    value_format: ClassVar[str] = "int2"


@dataclass(frozen=True)
class Tiers(Parted):
    """Stores the most important of the pairs as k8v4, and the others with keys in 4 bits and values in 2.

    LeanKV (arXiv 2412.03131, in later versions DiffKV) has these two tiers and a third, of pairs that are dropped: here
    a press's ratio says how many are, or its allocation: "above_uniform" is the paper's. Which pairs are important is
    said by the press's scores. "tiers:0.25" stores a quarter of a row's kept pairs high, in each layer, however they
    are spread over heads, and "tiers" a third. "tiers:1/n" compares scores with uniform attention, as the paper does:
    high are pairs with at least 1 / n, where n pairs share the attention, and "tiers:3/n" asks three times as much. It
    is for presses whose scores are weights of attention, and others are refused; so is eviction while the model writes.
    What a press protects is always high; pairs that were packed stay in their tier.
    """

    reads_importance: ClassVar[bool] = True
    share: ClassVar[float] = 1 / 3  # of a row's kept pairs in a layer
    uniform: ClassVar[float | None] = None  # if given, the least score of a high pair, in units of uniform attention

    @classmethod
    def with_parameters(cls, text: str) -> type[Storage]:
        """Returns the storage with a share between 0 and 1, as in "0.25", or a threshold, as in "1/n".

        Raises:
            InvalidArgumentError: The text is neither.
        """
        match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(/n)?", text)
        number = float(match[1]) if match else 0.0
        if match is None or not (match[2] or 0 < number < 1):
            raise InvalidArgumentError(
                "expected tiers with a share of pairs between 0 and 1, such as 'tiers:0.25', or with a threshold in "
                f"units of uniform attention, such as 'tiers:1/n', got 'tiers:{text:.80}'"
            )
        return _with_rule(cls, f"{number:g}", match[2] or "")

    @classmethod
    def check_widths(cls, head_dim: int, v_head_dim: int) -> None:
        """Raises InvalidArgumentError if one of the tiers cannot hold rows of these widths."""
        K8V4Rows.check_widths(head_dim, v_head_dim)
        K4V2Rows.check_widths(head_dim, v_head_dim)

    @property
    def others(self) -> Mapping[str, Storage]:
        """The storage of each tier."""
        shape = self.head_dim, self.v_head_dim, self.dtype
        return {HIGH: K8V4Rows(*shape), LOW: K4V2Rows(*shape)}

    def own_shapes(self) -> Shapes:
        """Returns the shape of what says in which tier a pair is."""
        return {IS_HIGH: (torch.uint8, ())}

    def own_columns(self, new: NewPairs) -> dict[str, torch.Tensor]:
        """Returns which pairs are high."""
        return {IS_HIGH: self.high(new).to(torch.uint8)}

    def where(self, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns, for each part, which pairs are in it."""
        first, is_high = columns[POSITIONS] < FIRST, columns[IS_HIGH].bool()
        return {SINKS: first, HIGH: is_high & ~first, LOW: ~is_high & ~first}

    def high(self, new: NewPairs) -> torch.Tensor:
        """Returns which of the kept pairs are important, ``[batch, num_heads, n]``, bool."""
        if new.importance is None:
            return new.keep
        if self.uniform is not None:
            return new.keep & (new.importance >= self.uniform)
        ranked = new.importance.masked_fill(~new.keep, -torch.inf).flatten(1)
        counts = (new.keep.flatten(1).sum(dim=1) * self.share).round().long()
        order = ranked.argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(ranked, dtype=torch.bool)
        best.scatter_(1, order, torch.arange(ranked.shape[1], device=ranked.device) < counts.unsqueeze(1))
        return new.keep & (best | ranked.isposinf()).view_as(new.keep)


@lru_cache(maxsize=64)
def _with_rule(kind: type[Tiers], number: str, unit: str) -> type[Tiers]:
    rule: dict[str, Any] = {"uniform" if unit else "share": float(number), "parameters": f"{number}{unit}"}
    rule["needs_weights"] = bool(unit)
    return type(kind.__name__, (kind,), rule)
