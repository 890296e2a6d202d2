"""A rotation that spreads outlier channels over a row before it is encoded in few bits (QuaRot, arXiv 2404.00456)."""

from functools import cache

import torch
from torch import Tensor


def rotate(rows: Tensor) -> Tensor:
    """Multiplies rows by the orthonormal Hadamard matrix of their width, which is its own inverse.

    Dot products of two rotated rows are those of the rows: rotated queries meet rotated keys.

    Args:
        rows: [..., head_dim], any floating dtype; head_dim a power of two.

    Returns:
        [..., head_dim] in the dtype of ``rows``; sums are fp32 (fp64 for fp64 rows).

    Raises:
        ValueError: head_dim is no power of two: there is no such matrix of Sylvester's kind.
    """
    width = rows.shape[-1]
    check_rotates(width)
    matrix = hadamard(width, rows.device)
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return (rows.to(exact) @ matrix.to(exact)).to(rows.dtype)


def check_rotates(width: int) -> None:
    """Raises ValueError unless rows of ``width`` numbers can be rotated."""
    if width < 1 or width & (width - 1):
        raise ValueError(
            f"rotate: expected a head_dim that is a power of two, got {width}; use a codec that needs no rotation"
        )


@cache
def hadamard(width: int, device: torch.device) -> Tensor:
    """Returns the symmetric orthonormal matrix [width, width], fp64, of Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(width.bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * width**-0.5).to(device)
