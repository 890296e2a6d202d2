"""Ragged attention to codes in plain PyTorch: a segment's numbers are written into one small buffer, tile by tile.

What is written are codes as numbers, with neither scale nor zero: those are folded into logits and weights, which are
few. So a pass over the codes, one matrix product and the reading of the codes are all that a pair costs, and no more
than a tile of a segment is ever decoded.
"""

import torch
from torch import Tensor

from kvzip_press.kernels.dense_attention.merge import merge_pair
from kvzip_press.kernels.numerics import MAX_LOGITS, accumulation_dtype, finite_peak, softcapped
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.tail import tail_attention
from kvzip_press.kernels.row_codec import Codes, write_numbers

TILE_BYTES = 1 << 19  # of a tile's numbers: what the caches of a core hold beside the codes


def reason_against(inputs: RaggedInputs, softcap: float | None) -> str | None:  # noqa: ARG001  # as dispatch asks
    """Returns why this implementation cannot do this input, or None if it can."""
    return None if isinstance(inputs.keys, Codes) else "keys and values are not codes"


def ragged_attention(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only."""
    inputs = inputs.with_live_tail()
    n_heads, dtype = inputs.num_key_value_heads, accumulation_dtype(inputs.query.dtype)
    query = inputs.query_of_context.to(dtype) * scaling
    folded = query.unflatten(1, (n_heads, -1)).flatten(0, 1).flatten(1, 2)
    out = folded.new_empty(*folded.shape[:2], inputs.values.shape[1])
    lse = folded.new_empty(folded.shape[:2])
    bias = None if inputs.context_bias is None else (inputs.context_bias.to(dtype) * scaling).reshape(lse.shape)
    for segment, (keys, values) in enumerate(inputs.segment_codes()):
        n_rows = max(1, MAX_LOGITS // max(1, keys.shape[0]))
        for start in range(0, lse.shape[1], n_rows):
            rows = segment, slice(start, start + n_rows)
            out[rows], lse[rows] = _attend(folded[rows], None if bias is None else bias[rows], keys, values, softcap)
    out = out.view(*inputs.query.shape[:3], -1).to(inputs.query.dtype)
    lse = lse.view(inputs.query.shape[:3])
    tail = tail_attention(inputs, scaling=scaling, softcap=softcap)
    return (out, lse) if tail is None else merge_pair(out, lse, *tail)


def _attend(
    query: Tensor, bias: Tensor | None, keys: Codes, values: Codes, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attends with scaled rows [rows, head_dim] to one segment; returns out [rows, value_head_dim] and lse [rows]."""
    n_pairs = keys.shape[0]
    if n_pairs == 0:
        return query.new_zeros(query.shape[0], values.shape[1]), query.new_full(query.shape[:1], -torch.inf)
    logits = _logits(query, keys)
    if bias is not None:
        logits += bias.unsqueeze(-1)
    logits = softcapped(logits, softcap)
    peak = finite_peak(logits, -1)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    return _weighted_sum(weights, values).div_(total), (total.log() + peak).squeeze(-1)


def _logits(query: Tensor, keys: Codes) -> Tensor:
    logits = query.new_empty(query.shape[0], keys.shape[0])
    sums = query.sum(-1, keepdim=True)
    for tile, buffer in _tiles(keys, query):
        numbers, scale, zero = write_numbers(keys[tile], buffer)
        part = torch.mm(query, numbers.T, out=logits[:, tile])
        if scale is not None:
            part *= scale
        if zero is not None:
            part.addcmul_(sums, zero.unsqueeze(0))
    return logits


def _weighted_sum(weights: Tensor, values: Codes) -> Tensor:
    """Returns weights [rows, n] times the decoded values [n, value_head_dim]; weights are written over."""
    out = weights.new_zeros(weights.shape[0], values.shape[1])
    zeros = weights.new_zeros(weights.shape[0], 1)
    for tile, buffer in _tiles(values, weights):
        numbers, scale, zero = write_numbers(values[tile], buffer)
        part = weights[:, tile]
        if zero is not None:
            zeros += part @ zero.unsqueeze(-1)
        if scale is not None:
            part *= scale
        out.addmm_(part, numbers)
    return out.add_(zeros)


def _tiles(codes: Codes, like: Tensor) -> list[tuple[slice, Tensor]]:
    """Returns stretches of rows and, for each, the same small buffer [rows, head_dim] for its numbers."""
    n_pairs, head_dim = codes.shape
    n_rows = max(1, min(n_pairs, TILE_BYTES // (head_dim * like.element_size())))
    buffer = like.new_empty(n_rows, head_dim)
    return [
        (slice(start, min(start + n_rows, n_pairs)), buffer[: n_pairs - start]) for start in range(0, n_pairs, n_rows)
    ]
