"""Arithmetic of row numbers that the implementations share."""

import torch
from torch import Tensor


def cumulated(counts: Tensor) -> Tensor:
    """Int64 [n + 1], how many come before each element and, last, how many there are."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))


def spread(per_segment: Tensor, lengths: Tensor, total: int) -> Tensor:
    """``per_segment``, each repeated for the ``lengths`` of its segment, ``total`` in all."""
    return per_segment.repeat_interleave(lengths, output_size=total)
