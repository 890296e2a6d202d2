"""What packing gives."""

from typing import NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """Kept pairs by segment = (row, key-value head), then in the order they came; each tensor has storage of its size.

    Attributes:
        columns: what a pair has (its key, value, position, score ...), each [total] or [total, dim], of any dtype.
        cu_seqlens: int32 [segments + 1], segment s is cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
    """

    columns: tuple[Tensor, ...]
    cu_seqlens: Tensor
