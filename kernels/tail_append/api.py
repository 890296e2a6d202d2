"""Checks and dispatch of :func:`tail_append`."""

from torch import Tensor, int64

from kvzip_press.kernels.checks import (
    check_device,
    check_dtype,
    check_groups,
    check_like,
    check_rank,
    check_shape,
)
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.tail_append import reference
from kvzip_press.kernels.tail_append.queries import Queries
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
    tail_keys: Tensor,
    tail_values: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    queries: Queries | None = None,
    impl: str | None = None,
) -> None:
    """Writes one token's keys and values of every row and head into preallocated tails, in place, and its queries.

    The index is read on the device, so that a captured CUDA graph can write the next token when it is replayed. Of a
    step, a launch takes longer than these few bytes, so queries that are kept go along.

    Args:
        tail_keys: [batch, num_key_value_heads, room, head_dim], written into; any dtype, any strides.
        tail_values: [batch, num_key_value_heads, room, value_head_dim], written into.
        keys: [batch, num_key_value_heads, 1, head_dim].
        values: [batch, num_key_value_heads, 1, value_head_dim].
        index: int64 [1], the row to write, 0 <= index < room. On a GPU only "reference" checks it.
        queries: the token's queries and the window that they are kept in; None if none are kept.
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
    for name, number in (("index", index), *(() if queries is None else (("shift", queries.shift),))):
        check_shape(name, number, (1,), "1")
        check_dtype(name, number, int64)
        check_device(name, number, tail_keys.device)
    tensors = [tail_keys, tail_values, keys, values]
    if queries is not None:
        _check_queries(queries, tail_keys)
        tensors += [queries.window, queries.new]
    run = select("tail_append", _IMPLS, impl, *tensors)
    run(tail_keys, tail_values, keys, values, index, queries)


def _check_queries(queries: Queries, tail_keys: Tensor) -> None:
    window, dims = queries.window, "batch, num_attention_heads, room, head_dim"
    check_rank("window", window, dims)
    check_groups(window.shape[1], tail_keys.shape[1])
    expected = (tail_keys.shape[0], window.shape[1], window.shape[2], tail_keys.shape[3])
    check_shape("window", window, expected, dims)
    check_device("window", window, tail_keys.device)
    check_shape("new", queries.new, (*window.shape[:2], 1, window.shape[3]), dims)
    check_like("new", queries.new, "window", window)
