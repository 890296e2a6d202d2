"""Checks and dispatch of :func:`tail_append`."""

from torch import Tensor, int64

from kvzip_press.kernels.checks import check_device, check_dtype, check_like, check_rank, check_shape
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.tail_append import reference
from kvzip_press.kernels.triton_support import reason_against_triton


def _reason_against_triton(tail_keys: Tensor, *others: Tensor) -> str | None:
    if any(tensor.stride(-1) != 1 for tensor in (tail_keys, *others)):
        return "the last dimension of a tensor is not contiguous"
    return reason_against_triton(tail_keys.device)


_IMPLS = {
    "triton": Impl(deferred("kvzip_press.kernels.tail_append.triton", "tail_append"), _reason_against_triton),
    "reference": Impl(reference.tail_append),
}


def tail_append(
    tail_keys: Tensor, tail_values: Tensor, keys: Tensor, values: Tensor, index: Tensor, *, impl: str | None = None
) -> None:
    """Writes one token's keys and values of every row and head into preallocated tails, in place.

    The index is read on the device, so that a captured CUDA graph can write the next token when it is replayed.

    Args:
        tail_keys: [batch, num_key_value_heads, room, head_dim], written into; any dtype, any strides.
        tail_values: [batch, num_key_value_heads, room, value_head_dim], written into.
        keys: [batch, num_key_value_heads, 1, head_dim].
        values: [batch, num_key_value_heads, 1, value_head_dim].
        index: int64 [1], the row to write, 0 <= index < room. On a GPU only "reference" checks it.
        impl: "triton" (one launch, CUDA), "reference" (plain PyTorch) or None: the first that can do this input.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above.
        TypeError: a dtype is not as above.
    """
    dims = "batch, num_key_value_heads, room, head_dim"
    for name, tail, new in (("keys", tail_keys, keys), ("values", tail_values, values)):
        check_rank(f"tail_{name}", tail, dims)
        batch_size, num_heads, _, head_dim = tail.shape
        check_shape(name, new, (batch_size, num_heads, 1, head_dim), dims)
        check_like(name, new, f"tail_{name}", tail)
    check_shape("tail_values", tail_values, (*tail_keys.shape[:3], tail_values.shape[3]), dims)
    check_device("tail_values", tail_values, tail_keys.device)
    check_shape("index", index, (1,), "1")
    check_dtype("index", index, int64)
    check_device("index", index, tail_keys.device)
    select("tail_append", _IMPLS, impl, tail_keys, tail_values, keys, values)(
        tail_keys, tail_values, keys, values, index
    )
