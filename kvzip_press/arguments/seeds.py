"""Seeds of what a press draws, layer by layer."""

from __future__ import annotations

import torch

from kvzip_press.errors import InvalidArgumentError

_LAYERS = 100_003  # generators of two seeds share no layer; a prime


def check_seed(seed: int) -> None:
    """Raises InvalidArgumentError for a seed of which no generator of a layer can be made."""
    if not 0 <= seed < 2**40:
        raise InvalidArgumentError(f"expected a seed from 0 to {2**40 - 1}, got {seed}")


def generator_of(seed: int, layer_idx: int) -> torch.Generator:
    """Returns the generator of a layer, on the CPU: its numbers are the same on every device."""
    return torch.Generator().manual_seed(int(seed) * _LAYERS + layer_idx)
