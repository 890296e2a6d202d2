"""The append in plain PyTorch."""

from torch import Tensor


def tail_append(tail_keys: Tensor, tail_values: Tensor, keys: Tensor, values: Tensor, index: Tensor) -> None:
    """See :func:`kvzip_press.kernels.tail_append.tail_append`."""
    tail_keys.index_copy_(2, index, keys)
    tail_values.index_copy_(2, index, values)
