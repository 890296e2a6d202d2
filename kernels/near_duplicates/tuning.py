"""Tiles of the kernel, chosen by shape from what the compiler says; nothing is tuned at run time."""

from typing import NamedTuple


class Config(NamedTuple):
    """The launch parameters.

    Attributes:
        block_i: keys of a program, a power of two >= 16.
        block_j: keys of a tile that they are compared with, a power of two >= 16.
        span: tiles that are compared before a program looks whether it is done.
        num_warps: warps of a program.
        num_stages: tiles in flight.
    """

    block_i: int
    block_j: int
    span: int
    num_warps: int
    num_stages: int


def config_for(head_dim: int, itemsize: int) -> Config:
    """Returns the tiles for a shape; none spills registers."""
    if itemsize == 4:  # no tensor cores: operands are in registers
        return Config(32, 64, 8, 8, 2) if head_dim <= 128 else Config(32, 32, 16, 8, 2)
    return Config(128, 64, 8, 8, 3 if head_dim <= 128 else 2)
