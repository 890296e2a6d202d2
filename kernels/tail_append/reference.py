"""The append in plain PyTorch."""

from torch import Tensor

from kvzip_press.kernels.tail_append.queries import Queries


def tail_append(
    tail_keys: Tensor, tail_values: Tensor, keys: Tensor, values: Tensor, index: Tensor, queries: Queries | None = None
) -> None:
    """See :func:`kvzip_press.kernels.tail_append.tail_append`."""
    tail_keys.index_copy_(2, index, keys)
    tail_values.index_copy_(2, index, values)
    if queries is not None:
        queries.window.index_copy_(2, (index + queries.shift) % queries.window.shape[2], queries.new)
