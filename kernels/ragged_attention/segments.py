"""Ragged attention of many query rows (a chunk of a prefill): dense attention per segment, merged with the tail.

With hundreds of rows a segment fills a GPU, and the speed of matrix products decides, at which dense kernels are best.
cuDNN's is not used: it plans anew for every length, 80 ms each, and no two segments are equally long. The host reads
the lengths once per call.
"""

import torch
from torch import Tensor

from kvzip_press.kernels.dense_attention import aten
from kvzip_press.kernels.dense_attention.api import unchecked
from kvzip_press.kernels.dense_attention.merge import merge_attention
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs

MIN_QUERY_LENGTH = 256


def reason_against(inputs: RaggedInputs, softcap: float | None) -> str | None:
    """Returns why this implementation cannot do this input, or None if it can."""
    query_length = inputs.query.shape[2]
    if query_length < MIN_QUERY_LENGTH:
        return f"there are {query_length} query rows, not {MIN_QUERY_LENGTH} or more"
    if inputs.tail_mask is not None or softcap is not None:
        return "a mask or a softcap is given"
    return aten.reason_against_flash(inputs.query, inputs.keys, inputs.values)


def ragged_attention(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only."""
    assert softcap is None, "see reason_against"
    inputs = inputs.with_live_tail()
    query = inputs.query
    groups = query.unflatten(1, (inputs.num_key_value_heads, -1)).flatten(0, 1).unsqueeze(1).unbind(0)
    segments = zip(groups, inputs.segments(), strict=True)
    results = [_attend(rows, keys, values, scaling) for rows, (keys, values) in segments]
    out, lse = (
        torch.cat(tensors).view(*query.shape[:2], *tensors[0].shape[2:]) for tensors in zip(*results, strict=True)
    )
    if inputs.tail_keys is None or inputs.tail_values is None or inputs.tail_length == 0:
        return out, lse
    tail = unchecked(query, inputs.tail_keys, inputs.tail_values, causal=True, mask=None, scaling=scaling)
    return merge_attention(out, lse, *tail)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attends to one segment: query [1, groups, rows, head_dim], keys [1, 1, n, head_dim]; 0 and -inf if n is 0."""
    if keys.shape[2] == 0:
        out = query.new_zeros(*query.shape[:3], values.shape[3])
        return out, query.new_full(query.shape[:3], -torch.inf, dtype=accumulation_dtype(query.dtype))
    return aten.uncovered(query, keys, values, scaling)
