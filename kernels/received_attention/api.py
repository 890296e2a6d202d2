"""Checks and dispatch of :func:`received_attention`."""

import torch
from torch import Tensor

from kvzip_press.kernels.checks import (
    check_device,
    check_dtype,
    check_floating,
    check_groups,
    check_like,
    check_rank,
    check_shape,
    check_softcap,
)
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.received_attention import reference
from kvzip_press.kernels.triton_support import reason_against_heads

_TRITON = "kvzip_press.kernels.received_attention.triton"
_IMPLS = {
    "triton": Impl(deferred(_TRITON, "received_attention"), reason_against_heads),
    "reference": Impl(reference.received_attention),
}


def received_attention(
    query: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    seen_from: Tensor,
    *,
    squared: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Returns the attention that each key gets from all queries together, as presses sum it up (H2O, SnapKV, TOVA).

    The softmax of a query runs over the keys that it sees: those that are seen from its position or an earlier one on.
    A query that sees none, as one at a negative position, pays none, and may hold anything, NaN too; so may a key that
    no query sees, but for NaN and infinity.

    Args:
        query: [batch, num_attention_heads, rows, head_dim], rows >= 0, any floating dtype.
        keys: [batch, num_key_value_heads, n, head_dim].
        query_positions: int64 [batch, rows], not negative; -1 for a query that sees nothing.
        seen_from: int64 [batch, num_key_value_heads, n], not negative: the first position from which a key is seen.
        squared: whether the squares of probabilities are summed (KV-Compress).
        scaling: factor of the logits; default head_dim ** -0.5.
        softcap: when given, logits become ``softcap * tanh(logits / softcap)`` after scaling.
        impl: "triton" (CUDA devices, or a CPU with ``TRITON_INTERPRET=1``; fp16, bf16 and fp32, head_dim up to 256,
            last dimension contiguous; two passes over tiles, products of fp16 and bf16 numbers are exact, and nothing
            of rows x keys is in memory), "reference" (plain PyTorch, query rows in blocks) or None: the first that can
            do this input.

    Returns:
        fp32 [batch, num_key_value_heads, n] (fp64 for fp64 inputs): the sum of a key's probabilities over all rows and
        over the query heads of its group. Logits, softmax and sums are in that dtype too.

    Raises:
        ValueError: a shape, device, ``softcap`` or ``impl`` is not as above, or ``impl`` cannot do this input.
        TypeError: a dtype is not as above.
    """
    check_rank("query", query, "batch, num_attention_heads, rows, head_dim")
    check_floating("query", query)
    batch_size, num_heads, n_rows, head_dim = query.shape
    check_rank("keys", keys, "batch, num_key_value_heads, n, head_dim")
    check_groups(num_heads, keys.shape[1])
    dims = "batch, num_key_value_heads, n"
    check_shape("keys", keys, (batch_size, *keys.shape[1:3], head_dim), f"{dims}, head_dim")
    check_like("keys", keys, "query", query)
    check_shape("query_positions", query_positions, (batch_size, n_rows), "batch, rows")
    check_shape("seen_from", seen_from, keys.shape[:3], dims)
    for name, positions in (("query_positions", query_positions), ("seen_from", seen_from)):
        check_dtype(name, positions, torch.int64)
        check_device(name, positions, query.device)
    check_softcap(softcap)
    run = select("received_attention", _IMPLS, impl, query, keys)
    scale = head_dim**-0.5 if scaling is None else scaling
    sums: Tensor = run(query, keys, query_positions, seen_from, squared=squared, scaling=scale, softcap=softcap)
    return sums
