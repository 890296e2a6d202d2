"""Storages that hold the pairs of a head in several ways: the first tokens exactly, the others in fewer bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kvzip_press.cache.codecs.held import POSITIONS, Encoded, Held, NewPairs, Staying
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Layout, Shapes, Storage
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.ragged_attention import Part

FIRST = 4  # tokens of a row, which every later token looks at, whatever they say
SINKS, OTHERS = "sinks", "others"


@dataclass(frozen=True)
class Parted(Storage):
    """Stores the first four tokens as the model made them, and the others in fewer bits; each in a part.

    These four get much of all attention (StreamingLLM, arXiv 2309.17453, calls them sinks), and their keys are unlike
    all others, so an error there is one of every answer. They cost next to nothing: there are four a head.
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

    def parts(
        self, query: torch.Tensor, held: Held, num_heads: int, row_index: torch.Tensor | None
    ) -> tuple[Part, ...]:
        """Returns the first tokens and what the other parts are."""
        return tuple(
            part
            for name, kind in self.in_parts.items()
            for part in kind.parts(query, held.parts[name], num_heads, row_index)
        )
