"""What cache layers have in common that stand in for others during a forward and attend by themselves."""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press import compat


class StandInLayer(compat.CacheLayerMixin):
    """A cache layer for one kind of forward behind ``n_seen`` tokens; a subclass adds ``update`` and ``attend``."""

    is_sliding = False
    n_seen: int

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to initialise."""

    def get_mask_sizes(self, cache_position: int | torch.Tensor) -> tuple[int, int]:
        """Masks are about the new tokens alone."""
        return compat.query_length_of(cache_position), self.n_seen

    def get_seq_length(self) -> int:
        """Tokens seen before the forward."""
        return self.n_seen

    def get_max_cache_shape(self) -> int:
        """No maximum."""
        return -1

    get_max_length = get_max_cache_shape
