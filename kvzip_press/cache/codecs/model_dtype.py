"""The storage "model": keys and values as the model made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvzip_press.cache.codecs.held import Encoded, Held, NewPairs
from kvzip_press.cache.codecs.storage import Layout, Storage
from kvzip_press.kernels.ragged_attention import Part


@dataclass(frozen=True)
class ModelDtype(Storage):
    """Stores keys and values as the model made them."""

    is_exact: ClassVar[bool] = True
    reads_lists: ClassVar[bool] = True

    def layout(self) -> Layout:
        """Returns the shapes of a key and a value."""
        return Layout({"keys": (self.dtype, (self.head_dim,)), "values": (self.dtype, (self.v_head_dim,))})

    def encode(self, new: NewPairs, before: Held | None = None) -> Encoded:
        """Returns keys and values as they are."""
        return Encoded({"keys": new.keys, "values": new.values}, new.keep)

    def decode(self, held: Held) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values as they are."""
        return held.columns["keys"], held.columns["values"]

    def parts(
        self, query: torch.Tensor, held: Held, num_heads: int, row_index: torch.Tensor | None
    ) -> tuple[Part, ...]:
        """Returns the tensors as they are."""
        return (Part(*self.decode(held), held.cu_seqlens),)
