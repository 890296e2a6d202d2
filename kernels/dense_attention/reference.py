"""Dense attention in plain PyTorch, a block of query rows at a time."""

from torch import Tensor

from kvzip_press.kernels.numerics import MAX_LOGITS, Part, accumulation_dtype, attend, causal_hidden


def attention_with_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.dense_attention.attention_with_lse`."""
    batch_size, num_heads, query_length, _ = query.shape
    num_kv_heads, key_length = keys.shape[1:3]
    dtype = accumulation_dtype(query.dtype)
    grouped = query.unflatten(1, (num_kv_heads, -1))
    keys, values = _batched(keys).to(dtype), _batched(values).to(dtype)
    out = query.new_empty(*grouped.shape[:-1], values.shape[-1])
    lse = query.new_empty(grouped.shape[:-1], dtype=dtype)
    n_rows = max(1, MAX_LOGITS // max(1, batch_size * num_heads * key_length))
    for start in range(0, query_length, n_rows):
        stop = min(start + n_rows, query_length)
        n_seen = max(0, key_length - query_length + stop) if causal else key_length
        hidden = _hidden(grouped, key_length, start, stop, causal, mask)
        part = Part(keys[:, :, :n_seen], values[:, :, :n_seen], None if hidden is None else hidden[..., :n_seen])
        rows = grouped[:, :, :, start:stop].to(dtype) * scaling
        out[:, :, :, start:stop], lse[:, :, :, start:stop] = attend(rows, [part], softcap)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _batched(tensor: Tensor) -> Tensor:
    """Returns ``tensor`` with batch and heads on one stride (copied at most once): no block's matmul then copies it."""
    return tensor.flatten(0, 1).unflatten(0, tensor.shape[:2])


def _hidden(
    grouped: Tensor, key_length: int, start: int, stop: int, causal: bool, mask: Tensor | None
) -> Tensor | None:
    """Returns bool, broadcasts to [batch, kv heads, groups, stop - start, key_length], True if a row must not look."""
    hidden = causal_hidden(start, stop, grouped.shape[3], key_length, grouped.device) if causal else None
    if mask is None:
        return hidden
    masked = mask[:, :, start:stop].logical_not()
    masked = masked.unsqueeze(2) if mask.shape[1] == 1 else masked.unflatten(1, grouped.shape[1:3])
    return masked if hidden is None else masked | hidden
