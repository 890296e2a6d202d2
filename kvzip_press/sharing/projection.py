"""What stands in the place of the key and value projections of a layer that reads those of another."""

from __future__ import annotations

import torch
from torch import nn


class SharedProjection(nn.Module):
    """Computes nothing: gives NaN in the shape of a projection's output, which takes no memory.

    The cache layer behind it drops what it is given. Whatever attended to it all the same would answer NaN, and not
    something that looks like an answer.

    Args:
        out_features: Width of the projection in whose place it stands.
        shares_with: Index of the layer whose keys and values are read. It is a plain value of the module, so that it
            counts in the fingerprint of the weights that make a cache.
    """

    def __init__(self, out_features: int, shares_with: int) -> None:
        super().__init__()
        self.out_features, self.shares_with = out_features, shares_with

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns NaN ``[..., out_features]`` for hidden states ``[..., in_features]``, in their dtype."""
        nothing = torch.full((), torch.nan, dtype=hidden_states.dtype, device=hidden_states.device)
        return nothing.expand(*hidden_states.shape[:-1], self.out_features)
