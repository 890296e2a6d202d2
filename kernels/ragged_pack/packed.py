"""What packing gives."""

from typing import NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """Kept pairs, ordered by segment = (row, key-value head), then position; each tensor has storage of its own size.

    Attributes:
        keys: [total, head_dim].
        values: [total, value_head_dim].
        positions: int32 [total], original position of each pair.
        cu_seqlens: int32 [segments + 1], segment s is cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    cu_seqlens: Tensor
