"""The queries that are written along with a token."""

from typing import NamedTuple

from torch import Tensor


class Queries(NamedTuple):
    """A token's queries, and where they go: the row ``(index + shift) % room`` of a window.

    Attributes:
        window: [batch, num_attention_heads, room, head_dim], written into; any dtype, any strides.
        new: [batch, num_attention_heads, 1, head_dim].
        shift: int64 [1]; ``index + shift`` is not negative.
    """

    window: Tensor
    new: Tensor
    shift: Tensor
