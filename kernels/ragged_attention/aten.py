"""Ragged attention by PyTorch's fused CPU kernel: a call per segment of the context, one for the tail, an exact merge.

The kernel divides its work among threads by heads and by blocks of query rows. A segment of a decode step has only one
of each, so a long segment is cut into as many equal parts as there are threads, which the kernel takes for heads. The
left-over keys (fewer than parts) get a call of their own. The tail, which is dense and may be masked, goes to the best
implementation of dense attention.
"""

from itertools import chain

import torch
from torch import Tensor

from kvzip_press.kernels.dense_attention.aten import flash, reason_against_flash
from kvzip_press.kernels.dense_attention.merge import merge_many
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.tail import tail_attention
from kvzip_press.kernels.row_codec import Codes

_ROWS_A_THREAD = 32  # query rows that the kernel gives a thread at a time
_MIN_PART = 512  # keys; a shorter part does not pay for the merge

_Partials = list[tuple[Tensor, Tensor]]


def reason_against(inputs: RaggedInputs, softcap: float | None) -> str | None:
    """Returns why this implementation cannot do this input, or None if it can."""
    if inputs.query.device.type != "cpu":
        return f"the device is {inputs.query.device.type}"
    if softcap is not None:
        return "a softcap is given"
    if isinstance(inputs.keys, Codes):
        return "keys and values are codes"
    return reason_against_flash(inputs.query, *inputs.dense)


def ragged_attention(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only."""
    assert softcap is None, "see reason_against"
    inputs = inputs.with_live_tail()
    n_segments = inputs.query.shape[0] * inputs.num_key_value_heads
    folded = inputs.query.reshape(n_segments, 1, 1, -1, inputs.query.shape[-1])
    partials = _context(folded, inputs, scaling)
    for own, tail in zip(partials, _tail(folded, inputs, scaling), strict=False):
        own.append(tail)
    outs, lses = (torch.cat(tensors, 1) for tensors in zip(*chain.from_iterable(partials), strict=True))
    shape = (n_segments, -1, *folded.shape[3:])
    out, lse = merge_many(outs.view(shape), lses.view(shape[:-1]))
    return out.to(folded.dtype).view(inputs.query.shape), lse.view(inputs.query.shape[:-1])


def _context(folded: Tensor, inputs: RaggedInputs, scaling: float) -> list[_Partials]:
    """Returns, for each segment, the results of its parts: out [1, parts, rows, head_dim] and lse [1, parts, rows].

    Segments with fewer parts are padded with parts that saw nothing, so that all results fit one tensor.
    """
    partials = [
        attend_segment(query, keys, values, scaling)
        for query, (keys, values) in zip(folded.unbind(0), inputs.segments(), strict=True)
    ]
    n_parts = [sum(out.shape[1] for out, _ in own) for own in partials]
    most = max(n_parts)
    if min(n_parts) < most:
        nothing = folded.new_zeros(()).expand(1, most, *folded.shape[3:])
        no_lse = folded.new_full((), -torch.inf, dtype=accumulation_dtype(folded.dtype)).expand(nothing.shape[:-1])
        for own, n_own in zip(partials, n_parts, strict=True):
            own.append((nothing[:, n_own:], no_lse[:, n_own:]))
    return partials


def _tail(folded: Tensor, inputs: RaggedInputs, scaling: float) -> _Partials:
    """Returns, for each segment, the result over its tail: out [1, 1, rows, head_dim], lse [1, 1, rows]; or nothing."""
    tail = tail_attention(inputs, scaling=scaling, softcap=None)
    if tail is None:
        return []
    out, lse = tail
    return list(zip(out.reshape(folded.shape).unbind(0), lse.reshape(folded.shape[:-1]).unbind(0), strict=True))


def attend_segment(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> _Partials:
    """Attends with query [1, 1, rows, head_dim] to one segment [1, 1, n, head_dim]: to its equal parts and the rest."""
    seqlen = keys.shape[2]
    if seqlen == 0:
        return []
    n_splits = _n_splits(query.shape[2], seqlen)
    if n_splits == 1:
        return [flash(query, keys, values, scaling)]
    middle = seqlen - seqlen % n_splits
    shape = (1, n_splits, middle // n_splits, -1)
    split_keys, split_values = (tensor[:, :, :middle].view(shape) for tensor in (keys, values))
    partials = [flash(query.expand(1, n_splits, -1, -1), split_keys, split_values, scaling)]
    if middle < seqlen:
        partials.append(flash(query, keys[:, :, middle:], values[:, :, middle:], scaling))
    return partials


def _n_splits(n_rows: int, seqlen: int) -> int:
    """Returns how many parts to cut a segment into: enough to keep the threads busy, none too short to be worth it."""
    busy_threads = -(-n_rows // _ROWS_A_THREAD)
    return max(1, min(torch.get_num_threads() // busy_threads, seqlen // _MIN_PART))
