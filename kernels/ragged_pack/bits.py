"""Numbers as integers: packing copies bits, whatever they mean."""

import torch
from torch import Tensor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def as_bits(tensor: Tensor) -> Tensor:
    """A view of the same numbers as integers, as PyTorch cannot gather every dtype (8-bit floats, unsigned integers).

    There are none of 16 bytes (complex128): those stay what they are.
    """
    return tensor.view(BITS.get(tensor.element_size(), tensor.dtype))
