"""The common part of cache layers that stand in for others during a forward and compute attention themselves."""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press import compat


class StandInLayer(compat.CacheLayerMixin):
    """A cache layer for one kind of forward after ``n_seen`` tokens; a subclass adds ``update`` and ``attend``."""

    is_sliding = False
    is_initialized = True  # Gemma 3 with images asks
    n_seen: int

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is nothing to initialise."""

    def get_mask_sizes(self, cache_position: int | torch.Tensor) -> tuple[int, int]:
        """Returns the length and the offset of the keys that masks cover: the new tokens only."""
        return compat.query_length_of(cache_position), self.n_seen

    def get_seq_length(self) -> int:
        """Returns the number of tokens seen before the forward."""
        return self.n_seen

    def get_max_cache_shape(self) -> int:
        """Returns -1: there is no maximum."""
        return -1

    get_max_length = get_max_cache_shape
