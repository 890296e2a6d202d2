"""The storage "tiers": important pairs in more bits than the others of the same head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.held import POSITIONS, Encoded, Held, NewPairs, Staying
from kvzip_press.cache.codecs.int4 import Int4
from kvzip_press.cache.codecs.k8v4 import K8V4
from kvzip_press.cache.codecs.storage import Attended, Layout, Storage
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.dense_attention import merge_attention

HIGH, LOW, IS_HIGH = "high", "low", "is_high"


@dataclass(frozen=True)
class K4V2(Int4):
    """Stores a key in 4 bits, centred and rotated as in int4, and a value in 2."""

    value_format: ClassVar[str] = "int2"


@dataclass(frozen=True)
class Tiers(Storage):
    """Stores the most important of the pairs as k8v4, and the others with keys in 4 bits and values in 2.

    LeanKV (arXiv 2412.03131, in later versions DiffKV) has these two tiers and a third, of pairs that are dropped: here
    a press's ratio says how many are. Which pairs are important is said by the press's scores. "tiers:0.25" stores a
    quarter of a row's kept pairs high, in each layer, however they are spread over heads, and "tiers" a third.
    "tiers:1/n" compares scores with uniform attention, as the paper does: high are pairs with at least 1 / n, for a row
    that has seen n tokens, and "tiers:3/n" asks three times as much. It is for presses whose scores are weights of
    attention. What a press protects is always high; pairs that were packed stay in their tier.
    """

    share: ClassVar[float] = 1 / 3  # of a row's kept pairs in a layer
    uniform: ClassVar[float | None] = None  # if given, the least score of a high pair, times the tokens seen

    @classmethod
    @lru_cache(maxsize=64)
    def with_parameters(cls, text: str) -> type[Storage]:
        """Returns the storage with a share between 0 and 1, as in "0.25", or a threshold, as in "1/n".

        Raises:
            InvalidArgumentError: The text is neither.
        """
        match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(/n)?", text)
        number = float(match[1]) if match else -1.0
        if match is None or (not match[2] and not 0 < number < 1):
            raise InvalidArgumentError(
                "expected tiers with a share of pairs between 0 and 1, such as 'tiers:0.25', or with a threshold in "
                f"units of uniform attention, such as 'tiers:1/n', got 'tiers:{text:.80}'"
            )
        rule = {"uniform": number} if match[2] else {"share": number}
        return type(cls.__name__, (cls,), {**rule, "parameters": f"{number:g}{match[2] or ''}"})

    @classmethod
    def check_widths(cls, head_dim: int, v_head_dim: int) -> None:
        """Raises InvalidArgumentError if one of the tiers cannot hold rows of these widths."""
        K8V4.check_widths(head_dim, v_head_dim)
        K4V2.check_widths(head_dim, v_head_dim)

    @property
    def tiers(self) -> dict[str, Storage]:
        """The storage of each tier."""
        shape = self.head_dim, self.v_head_dim, self.dtype
        return {HIGH: K8V4(*shape), LOW: K4V2(*shape)}

    def layout(self) -> Layout:
        """Returns the shape of what says where a pair is, and the layouts of both tiers."""
        return Layout({IS_HIGH: (torch.uint8, ())}, parts={name: tier.layout() for name, tier in self.tiers.items()})

    def encode(self, new: NewPairs, before: Held | None = None) -> Encoded:
        """Returns which pairs are high, and the pairs of each tier."""
        high = self.high(new)
        of_tiers = {HIGH: new.keep & high, LOW: new.keep & ~high}
        parts = {
            name: tier.encode(replace(new, keep=of_tiers[name]), None if before is None else before.parts[name])
            for name, tier in self.tiers.items()
        }
        return Encoded({IS_HIGH: high.to(torch.uint8)}, new.keep, parts=parts)

    def high(self, new: NewPairs) -> torch.Tensor:
        """Returns which of the kept pairs are important, ``[batch, num_heads, n]``, bool."""
        if new.importance is None:
            return new.keep
        if self.uniform is not None:
            n_seen = new.positions.amax(dim=1).add(1) if new.positions.shape[1] else new.positions.sum(dim=1)
            return new.keep & (new.importance * n_seen[:, None, None] >= self.uniform)
        ranked = new.importance.masked_fill(~new.keep, -torch.inf).flatten(1)
        counts = (new.keep.flatten(1).sum(dim=1) * self.share).round().long()
        order = ranked.argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(ranked, dtype=torch.bool)
        best.scatter_(1, order, torch.arange(ranked.shape[1], device=ranked.device) < counts.unsqueeze(1))
        return new.keep & (best | ranked.isposinf()).view_as(new.keep)

    def staying(self, held: Held, kept: torch.Tensor | None) -> Mapping[str, Staying]:
        """Returns those pairs of each tier that stay."""
        masks = {name: None if kept is None else kept[where] for name, where in self._where(held).items()}
        return {name: Staying(held.parts[name], masks[name]) for name in masks}

    def after_eviction(self, held: Held) -> Held:
        """Returns what is held with the tables of its tiers as these are after an eviction."""
        of_tiers = self._tiers(held)
        parts = {name: tier.after_eviction(of_tiers[name]) for name, tier in self.tiers.items()}
        parts = {name: replace(held.parts[name], tables=part.tables) for name, part in parts.items()}
        return replace(held, parts=parts)

    def check(self, held: Held) -> None:
        """Raises InvalidArgumentError unless the tiers have as many pairs in each segment as are said to be in them."""
        segments = held.segments_of_entries()
        for name, where in self._where(held).items():
            counted = torch.bincount(segments[where], minlength=len(held.cu_seqlens) - 1)
            if not torch.equal(counted, held.parts[name].cu_seqlens.diff().long()):
                raise InvalidArgumentError(f"expected as many {name} pairs as are said to be, got others")

    def decode(self, held: Held) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values, each as its tier decodes it."""
        keys, values = (
            torch.empty(held.total, width, dtype=self.dtype, device=held.cu_seqlens.device)
            for width in (self.head_dim, self.v_head_dim)
        )
        where, of_tiers = self._where(held), self._tiers(held)
        for name, tier in self.tiers.items():
            keys[where[name]], values[where[name]] = tier.decode(of_tiers[name])
        return keys, values

    def attend(
        self,
        query: torch.Tensor,
        held: Held,
        tail_keys: torch.Tensor | None,
        tail_values: torch.Tensor | None,
        *,
        tail_mask: torch.Tensor | None = None,
        tail_length: torch.Tensor | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Attended:
        """Computes attention to the low pairs, and to the high ones with the tail; both by their weights."""
        no_tail = (
            (None, None) if tail_keys is None or tail_values is None else (tail_keys[:, :, :0], tail_values[:, :, :0])
        )
        of_tail = {"tail_mask": tail_mask, "tail_length": tail_length}
        low = self.tiers[LOW].attend(query, held.parts[LOW], *no_tail, return_lse=True, **options)
        high = self.tiers[HIGH].attend(
            query, held.parts[HIGH], tail_keys, tail_values, return_lse=True, **of_tail, **options
        )
        out, lse = merge_attention(*high, *low)
        return (out, lse) if return_lse else out

    def _where(self, held: Held) -> dict[str, torch.Tensor]:
        is_high = held.columns[IS_HIGH].bool()
        return {HIGH: is_high, LOW: ~is_high}

    def _tiers(self, held: Held) -> dict[str, Held]:
        """Returns the tiers with the positions of their pairs."""
        positions = {name: held.columns[POSITIONS][where] for name, where in self._where(held).items()}
        return {
            name: replace(part, columns={**part.columns, POSITIONS: positions[name]})
            for name, part in held.parts.items()
        }
