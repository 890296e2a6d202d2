"""Tiles of the two passes, chosen by shape from measurements on an H200: nothing is tuned at run time."""

from dataclasses import dataclass

import torch

from kvzip_press.kernels.triton_support import multiprocessors


@dataclass(frozen=True)
class Config:
    """The launch parameters of a pass.

    Attributes:
        block_m: query rows of a tile, a power of two >= 16.
        block_n: keys of a tile, a power of two >= 16.
        num_warps: warps of a program.
        num_stages: tiles in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def row_config(head_dim: int, itemsize: int) -> Config:
    """Returns the tiles of the first pass; none spills registers."""
    if itemsize == 4:  # no tensor cores: operands are in registers, and larger tiles or more stages spill
        return Config(32, 32, 8, 1)
    return Config(64, 64, 4, 3) if head_dim <= 128 else Config(128, 64, 8, 2)


def column_config(head_dim: int, itemsize: int) -> Config:
    """Returns the tiles of the second pass; none spills registers."""
    if itemsize == 4:
        return Config(32, 64, 8, 2) if head_dim <= 128 else Config(32, 32, 8, 2)
    return Config(64, 128, 4, 3) if head_dim <= 128 else Config(64, 128, 4, 2)


def n_column_splits(n_blocks: int, device: torch.device) -> int:
    """Returns how many parts the second pass cuts its rows into, for ``n_blocks`` blocks of keys, heads and batch rows.

    About two programs per multiprocessor; at least two parts even with more blocks, which evens out the load.
    """
    return max(2, 2 * multiprocessors(device) // max(1, n_blocks))
