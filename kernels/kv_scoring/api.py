"""Checks and dispatch of :func:`kv_scoring`."""

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
from kvzip_press.kernels.kv_scoring import reference
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.triton_support import reason_against_heads

_IMPLS = {
    "triton": Impl(deferred("kvzip_press.kernels.kv_scoring.triton", "kv_scoring"), reason_against_heads),
    "reference": Impl(reference.kv_scoring),
}


def kv_scoring(
    query: Tensor,
    sink_keys: Tensor,
    chunk_keys: Tensor,
    replay_keys: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    key_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    lse: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Returns the largest attention that each key of a context chunk gets while the model replays the chunk.

    The score of KVzip (arXiv 2505.23416): the softmax runs over sink, chunk and replay keys; replay row i sees all sink
    and chunk keys and the replay keys j <= i. A chunk key's score is the maximum of its probability over all rows and
    over the query heads of its group. Keys of other chunks are not in the denominator.

    Args:
        query: [batch, num_attention_heads, n_rows, head_dim], the replay's queries, n_rows >= 1, any floating dtype.
        sink_keys: [batch, num_key_value_heads, n_sink, head_dim], n_sink >= 0.
        chunk_keys: [batch, num_key_value_heads, n_chunk, head_dim], the keys to score.
        replay_keys: [batch, num_key_value_heads, n_rows, head_dim], the replay's own keys.
        scaling: factor of the logits; default head_dim ** -0.5.
        softcap: when given, logits become ``softcap * tanh(logits / softcap)`` after scaling.
        key_weight: [batch, num_attention_heads, n_chunk], any floating dtype: factor of each key's probabilities before
            the maximum (KVzip+: the norm of the value after the output projection of that query head).
        query_weight: [batch, n_rows], any floating dtype: factor of each row's probabilities before the maximum
            (KVzip+: one over the norm of the row's hidden state).
        lse: [batch, num_attention_heads, n_rows], fp32 (fp64 for fp64 inputs), for callers that have it from the
            replay's own attention: the natural log of the sum of exp(logits) over each row's sink, chunk and visible
            replay keys. A probability is then exp(logit - lse), and sink_keys and replay_keys are not read.
        impl: "triton" (CUDA devices, or a CPU with ``TRITON_INTERPRET=1``; fp16, bf16 and fp32, head_dim up to 256,
            last dimension contiguous; two passes over tiles, nothing of rows x keys in memory), "reference" (plain
            PyTorch, query rows in blocks so that logits stay small) or None: the best that can do the input.

    Returns:
        Scores [batch, num_key_value_heads, n_chunk], fp32 (fp64 for fp64 inputs), without weights in [0, 1] up to
        rounding. Logits, softmax and weights are in that dtype too, whatever the dtype of the inputs.

    Raises:
        ValueError: a shape, device, ``softcap`` or ``impl`` is not as above, or ``impl`` cannot do this input.
        TypeError: a dtype is not as above.
    """
    _check_keys(query, sink_keys, chunk_keys, replay_keys)
    _check_weights(query, chunk_keys.shape[2], key_weight, query_weight)
    _check_lse(query, lse)
    check_softcap(softcap)
    run = select("kv_scoring", _IMPLS, impl, query, sink_keys, chunk_keys, replay_keys)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return run(
        query,
        sink_keys,
        chunk_keys,
        replay_keys,
        scaling=scale,
        softcap=softcap,
        key_weight=key_weight,
        query_weight=query_weight,
        lse=lse,
    )


def _check_keys(query: Tensor, sink_keys: Tensor, chunk_keys: Tensor, replay_keys: Tensor) -> None:
    check_rank("query", query, "batch, num_attention_heads, n_rows, head_dim")
    check_floating("query", query)
    batch_size, num_heads, n_rows, head_dim = query.shape
    if n_rows < 1:
        raise ValueError("query: expected at least one row, got none")
    check_rank("chunk_keys", chunk_keys, "batch, num_key_value_heads, n_chunk, head_dim")
    check_groups(num_heads, chunk_keys.shape[1])
    check_rank("sink_keys", sink_keys, "batch, num_key_value_heads, n_sink, head_dim")
    lengths = {"sink": sink_keys.shape[2], "chunk": chunk_keys.shape[2], "replay": n_rows}
    for (name, length), keys in zip(lengths.items(), (sink_keys, chunk_keys, replay_keys), strict=True):
        expected = (batch_size, chunk_keys.shape[1], length, head_dim)
        check_shape(f"{name}_keys", keys, expected, f"batch, num_key_value_heads, n_{name}, head_dim")
        check_like(f"{name}_keys", keys, "query", query)


def _check_weights(query: Tensor, n_chunk: int, key_weight: Tensor | None, query_weight: Tensor | None) -> None:
    batch_size, num_heads, n_rows, _ = query.shape
    expected = {
        "key_weight": (key_weight, (batch_size, num_heads, n_chunk), "batch, num_attention_heads, n_chunk"),
        "query_weight": (query_weight, (batch_size, n_rows), "batch, n_rows"),
    }
    for name, (weight, shape, dims) in expected.items():
        if weight is not None:
            check_shape(name, weight, shape, dims)
            check_floating(name, weight)
            check_device(name, weight, query.device)


def _check_lse(query: Tensor, lse: Tensor | None) -> None:
    if lse is not None:
        check_shape("lse", lse, query.shape[:3], "batch, num_attention_heads, n_rows")
        check_dtype("lse", lse, accumulation_dtype(query.dtype))
        check_device("lse", lse, query.device)
