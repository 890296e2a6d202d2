"""KVzip's score in plain PyTorch, a block of replay rows at a time."""

import torch
from torch import Tensor

from kvzip_press.kernels.numerics import MAX_LOGITS, accumulation_dtype, causal_hidden, softcapped


def kv_scoring(
    query: Tensor,
    sink_keys: Tensor,
    chunk_keys: Tensor,
    replay_keys: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """See :func:`kvzip_press.kernels.kv_scoring.kv_scoring`."""
    dtype = accumulation_dtype(query.dtype)
    grouped = query.unflatten(1, (chunk_keys.shape[1], -1))
    n_sink, n_chunk = sink_keys.shape[2], chunk_keys.shape[2]
    keys = (chunk_keys if lse is not None else torch.cat([sink_keys, chunk_keys, replay_keys], 2)).to(dtype)
    weight = _weight(grouped, key_weight, dtype)
    scores = keys.new_full(chunk_keys.shape[:3], -torch.inf)
    n_rows = max(1, MAX_LOGITS // (grouped.shape[:3].numel() * max(1, keys.shape[2])))
    for start in range(0, query.shape[2], n_rows):
        stop = min(start + n_rows, query.shape[2])
        rows = grouped[:, :, :, start:stop].to(dtype) * scaling
        if lse is not None:
            shares = _shares_of_lse(rows, keys, softcap, lse[:, :, start:stop])
        else:
            shares = _shares(rows, keys[:, :, : n_sink + n_chunk + stop], softcap)[..., n_sink : n_sink + n_chunk]
        if weight is not None:
            shares = shares * weight
        if query_weight is not None:
            shares = shares * query_weight[:, None, None, start:stop, None].to(dtype)
        scores = scores.maximum(shares.flatten(2, 3).amax(2))
    return scores


def _weight(grouped: Tensor, key_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns the weight of each key for each query head, [batch, kv heads, groups, 1, n_chunk]."""
    return None if key_weight is None else key_weight.unflatten(1, grouped.shape[1:3]).unsqueeze(3).to(dtype)


def _shares(rows: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    """Returns the softmax of scaled rows [..., groups, n, head_dim] over keys; the last n are their own, and causal."""
    n_rows = rows.shape[3]
    logits = _logits(rows, keys, softcap)
    logits[..., -n_rows:].masked_fill_(causal_hidden(0, n_rows, n_rows, n_rows, rows.device), -torch.inf)
    return logits.softmax(-1)


def _shares_of_lse(rows: Tensor, keys: Tensor, softcap: float | None, lse: Tensor) -> Tensor:
    """Returns probabilities of keys for scaled rows whose ``lse`` [batch, query heads, n] is known; none is masked."""
    return (_logits(rows, keys, softcap) - lse.unflatten(1, rows.shape[1:3]).unsqueeze(-1)).exp_()


def _logits(rows: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    return softcapped(rows.flatten(2, 3) @ keys.transpose(-1, -2), softcap).unflatten(2, rows.shape[2:4])
