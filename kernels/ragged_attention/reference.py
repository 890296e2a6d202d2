"""Ragged attention in plain PyTorch: a loop over (row, head) segments, with a block of query rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvzip_press.kernels.numerics import MAX_LOGITS, Part, accumulation_dtype, attend, causal_hidden
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.row_codec import Codes, decode_rows


def ragged_attention(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; returns out and lse."""
    inputs = inputs.with_live_tail()
    n_heads = inputs.num_key_value_heads
    grouped = inputs.query.unflatten(1, (n_heads, -1))
    out = grouped.new_empty(*grouped.shape[:-1], inputs.values.shape[-1])
    lse = grouped.new_empty(grouped.shape[:-1], dtype=accumulation_dtype(grouped.dtype))
    for segment, context in enumerate(_contexts(inputs, lse.dtype)):
        row, head = divmod(segment, n_heads)
        parts = [context, *_tail(inputs, row, head)]
        _attend_segment(grouped[row, head], parts, scaling, softcap, out[row, head], lse[row, head])
    return out.flatten(1, 2), lse.flatten(1, 2)


def _contexts(inputs: RaggedInputs, dtype: torch.dtype) -> Iterator[Part]:
    """Yields the packed context of each segment; codes are decoded, a segment at a time."""
    if not isinstance(inputs.keys, Codes):
        for keys, values in inputs.segments():
            yield Part(keys[0, 0].to(dtype), values[0, 0].to(dtype))
        return
    query = inputs.query_of_context.to(dtype)
    bias = query.new_zeros(query.shape[:3]) if inputs.context_bias is None else inputs.context_bias
    with_bias = torch.cat([query, bias.unsqueeze(-1)], -1)  # meets a 1 behind each key
    queries = with_bias.unflatten(1, (inputs.num_key_value_heads, -1)).flatten(0, 1)
    for own, (key_codes, value_codes) in zip(queries, inputs.segment_codes(), strict=True):
        decoded = torch.nn.functional.pad(decode_rows(key_codes, dtype), (0, 1), value=1.0)
        yield Part(decoded, decode_rows(value_codes, dtype), query=own)


def _tail(inputs: RaggedInputs, row: int, head: int) -> list[Part]:
    """Returns the tail of a segment, if any; ``hidden`` still has all query rows, and None means the causal rule."""
    if inputs.tail_keys is None or inputs.tail_values is None or inputs.tail_length == 0:
        return []
    dtype = accumulation_dtype(inputs.query.dtype)
    hidden = None if inputs.tail_mask is None else _hidden_tail(inputs.tail_mask, row, head, inputs.num_key_value_heads)
    return [Part(inputs.tail_keys[row, head].to(dtype), inputs.tail_values[row, head].to(dtype), hidden)]


def _hidden_tail(tail_mask: Tensor, row: int, head: int, num_kv_heads: int) -> Tensor:
    """Returns bool [groups or 1, query_length, tail_length], True where the rows of this segment must not look."""
    visible = tail_mask[row if tail_mask.shape[0] > 1 else 0]
    if visible.shape[0] > 1:
        visible = visible.unflatten(0, (num_kv_heads, -1))[head]
    return visible.logical_not()


def _attend_segment(
    query: Tensor, parts: list[Part], scaling: float, softcap: float | None, out: Tensor, lse: Tensor
) -> None:
    """Fills out [groups, query_length, value_head_dim] and lse [groups, query_length] of one segment."""
    groups, query_length, _ = query.shape
    n_keys = sum(part.keys.shape[0] for part in parts)
    n_rows = max(1, MAX_LOGITS // max(1, groups * n_keys))
    for start in range(0, query_length, n_rows):
        stop = min(start + n_rows, query_length)
        block = [
            _context_block(parts[0], start, stop, scaling),
            *(_tail_block(part, start, stop, query_length) for part in parts[1:]),
        ]
        rows = query[:, start:stop].to(lse.dtype) * scaling
        out[:, start:stop], lse[:, start:stop] = attend(rows, block, softcap)


def _context_block(context: Part, start: int, stop: int, scaling: float) -> Part:
    return context if context.query is None else context._replace(query=context.query[:, start:stop] * scaling)


def _tail_block(tail: Part, start: int, stop: int, query_length: int) -> Part:
    if tail.hidden is not None:
        return tail._replace(hidden=tail.hidden[:, start:stop])
    if query_length == 1:
        return tail
    hidden = causal_hidden(start, stop, query_length, tail.keys.shape[0], tail.keys.device)
    return tail._replace(hidden=hidden)
