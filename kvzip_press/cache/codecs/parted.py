"""Storages that hold the pairs of a head in several ways: the first tokens exactly, the others in fewer bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvzip_press.cache.codecs.held import POSITIONS, Encoded, Held, NewPairs, Staying
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Attended, Layout, Shapes, Storage
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.dense_attention import merge_attention

FIRST = 4  # tokens of a row, which every later token looks at, whatever they say
SINKS, OTHERS = "sinks", "others"


@dataclass(frozen=True)
class Parted(Storage):
    """Stores the first four tokens as the model made them, and the others in fewer bits; each in a part.

    These four get much of all attention (StreamingLLM, arXiv 2309.17453, calls them sinks), and their keys are unlike
    all others, so an error there is one of every answer. They cost next to nothing: there are four a head. Attention to
    them has a launch of its own, with the tail, which is in the model's dtype too; what the parts give is merged by
    their log-sum-exp.
    """

    @property
    @abstractmethod
    def others(self) -> Mapping[str, Storage]:
        """How pairs behind the first tokens are stored, by the names of the parts."""

    @property
    def in_parts(self) -> dict[str, Storage]:
        """How pairs are stored, by the names of the parts."""
        return {SINKS: ModelDtype(self.head_dim, self.v_head_dim, self.dtype), **self.others}

    def own_shapes(self) -> Shapes:
        """Returns the shapes of the columns that say, beside positions, in which part a pair is; most need none."""
        return {}

    def own_columns(self, new: NewPairs) -> dict[str, torch.Tensor]:
        """Returns these columns of a dense span."""
        return {}

    def where(self, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns, for each part, which pairs are in it, given the columns of :meth:`own_columns` and positions."""
        first = columns[POSITIONS] < FIRST
        return {SINKS: first, OTHERS: ~first}

    def layout(self) -> Layout:
        """Returns the columns that say where a pair is, and the layouts of the parts."""
        return Layout(self.own_shapes(), parts={name: kind.layout() for name, kind in self.in_parts.items()})

    def encode(self, new: NewPairs, before: Held | None = None) -> Encoded:
        """Returns the pairs of each part."""
        columns = self.own_columns(new)
        where = self.where({**columns, POSITIONS: new.positions.unsqueeze(1).expand(new.keep.shape)})
        parts = {}
        for name, kind in self.in_parts.items():
            there = None if before is None else before.parts[name]
            begins = there is None or not there.total  # a short first span may have been all sinks
            parts[name] = kind.encode(replace(new, keep=new.keep & where[name]), None if begins else there)
        return Encoded(columns, new.keep, parts=parts)

    def staying(self, held: Held, kept: torch.Tensor | None) -> Mapping[str, Staying]:
        """Returns those pairs of each part that stay."""
        where = self.where(held.columns)
        return {name: Staying(part, None if kept is None else kept[where[name]]) for name, part in held.parts.items()}

    def check(self, held: Held) -> None:
        """Raises InvalidArgumentError unless each part has as many pairs in each segment as belong there."""
        segments = held.segments_of_entries()
        for name, there in self.where(held.columns).items():
            counted = torch.bincount(segments[there], minlength=len(held.cu_seqlens) - 1)
            if not torch.equal(counted, held.parts[name].cu_seqlens.diff().long()):
                raise InvalidArgumentError(f"expected as many pairs in the part {name!r} as belong there, got others")

    def decode(self, held: Held) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values, each as its part decodes it."""
        keys, values = (
            torch.empty(held.total, width, dtype=self.dtype, device=held.cu_seqlens.device)
            for width in (self.head_dim, self.v_head_dim)
        )
        for name, there in self.where(held.columns).items():
            keys[there], values[there] = self.in_parts[name].decode(held.parts[name])
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
        """Computes attention to the first tokens and the tail, and to each of the other parts."""
        options["return_lse"] = True
        in_parts, of_tail = self.in_parts, {"tail_mask": tail_mask, "tail_length": tail_length}
        attended = in_parts[SINKS].attend(query, held.parts[SINKS], tail_keys, tail_values, **of_tail, **options)
        if tail_keys is not None and tail_values is not None:  # a tail of no tokens says how many heads there are
            tail_keys, tail_values = tail_keys[:, :, :0], tail_values[:, :, :0]
        for name in self.others:
            other = in_parts[name].attend(query, held.parts[name], tail_keys, tail_values, **options)
            attended = merge_attention(*attended, *other)
        out, lse = attended
        return (out, lse) if return_lse else out
