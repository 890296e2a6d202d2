"""Ragged attention to codes in plain PyTorch: numbers of codes are written into one small buffer, tile by tile.

What is written are codes as numbers, with neither scale nor zero: those are folded into logits and weights, which are
few. So a pass over the codes, one matrix product and the reading of the codes are all that a pair costs, and no more
than a tile is ever decoded. Bits that lie high in a byte are not shifted down: queries, and sums of values, are divided
by what they are too large. A tile takes several segments if they are short, and what is done for each segment is a few
operations, since each of them takes as long as a hundred pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvzip_press.kernels.dense_attention.merge import merge_pair
from kvzip_press.kernels.numerics import MAX_LOGITS, accumulation_dtype, softcapped
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.tail import tail_attention
from kvzip_press.kernels.row_codec import Codes, plane_factors, row_scales, write_numbers

TILE_BYTES = 1 << 19  # of a tile's numbers: what the caches of a core hold beside the codes


def reason_against(inputs: RaggedInputs, softcap: float | None) -> str | None:  # noqa: ARG001  # as dispatch asks
    """Returns why this implementation cannot do this input, or None if it can."""
    return None if isinstance(inputs.keys, Codes) else "keys and values are not codes"


def ragged_attention(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only."""
    inputs = inputs.with_live_tail()
    if inputs.query.numel() == 0:
        return _nothing(inputs)
    n_heads, dtype = inputs.num_key_value_heads, accumulation_dtype(inputs.query.dtype)
    query = inputs.query_of_context.to(dtype) * scaling
    folded = query.unflatten(1, (n_heads, -1)).flatten(0, 1).flatten(1, 2)
    bias = None if inputs.context_bias is None else (inputs.context_bias.to(dtype) * scaling).view(folded.shape[:2])
    n_queries = folded.shape[1]
    if n_queries > 1 and n_queries % 2:  # products of 4 rows take three quarters of the time of 3
        folded, bias = pad(folded, (0, 0, 0, 1)), None if bias is None else pad(bias, (0, 1))
    segments = inputs.segment_rows()
    first, last = min(pairs.start for pairs in segments), max(pairs.stop for pairs in segments)
    segments = [slice(pairs.start - first, pairs.stop - first) for pairs in segments]
    keys, values = (codes[first:last] for codes in inputs.codes)
    attention = _Attention.of(folded, bias, keys, values, softcap)
    longest = max(pairs.stop - pairs.start for pairs in segments)
    n_rows = max(1, MAX_LOGITS // max(1, longest))
    for start in range(0, folded.shape[1], n_rows):
        rows = slice(start, min(start + n_rows, folded.shape[1]))
        for run in _runs(segments, MAX_LOGITS // (rows.stop - rows.start)):
            attention.run(rows, run, segments)
    out, lse = (x[:, :n_queries] for x in attention.result())
    out = out.to(inputs.query.dtype).reshape(*inputs.query.shape[:3], -1)
    lse = lse.reshape(inputs.query.shape[:3])
    tail = tail_attention(inputs, scaling=scaling, softcap=softcap)
    return (out, lse) if tail is None else merge_pair(out, lse, *tail)


def _nothing(inputs: RaggedInputs) -> tuple[Tensor, Tensor]:
    """Returns the results of a query without rows."""
    query, width = inputs.query, inputs.values.shape[1]
    lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    return query.new_empty(*query.shape[:3], width), lse


def _runs(segments: Sequence[slice], most: int) -> Iterator[range]:
    """Yields segments that lie one behind another in memory, of ``most`` pairs together unless one alone has more."""
    first = 0
    for i, pairs in enumerate(segments):
        if i > first and (pairs.start != segments[i - 1].stop or pairs.stop - segments[first].start > most):
            yield range(first, i)
            first = i
    yield range(first, len(segments))


@dataclass(frozen=True)
class _Rows:
    """Codes [n, head_dim], and what makes rows of their numbers: see ``row_scales``."""

    codes: Codes
    scale: Tensor | None
    zero: Tensor | None
    factors: Tensor

    @classmethod
    def of(cls, codes: Codes, like: Tensor) -> _Rows:
        """Reads scales and zeros of all rows, whose bytes are few beside the codes'."""
        factors = like.new_tensor(plane_factors(codes))[:, None, None]
        return cls(codes, *row_scales(codes, like.dtype), factors)

    def tiles(self, run: range, segments: Sequence[slice], buffer: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Yields a segment, a stretch of its pairs, and their numbers [planes, pairs, width], all in one buffer."""
        head_dim, end = self.codes.shape[1], segments[run[-1]].stop
        n_pairs = buffer.numel() // head_dim
        for start in range(segments[run[0]].start, end, n_pairs):
            stop = min(start + n_pairs, end)
            numbers = buffer[: (stop - start) * head_dim].view(len(self.factors), stop - start, -1)
            write_numbers(self.codes[start:stop], numbers)
            for i in run:
                low, high = max(segments[i].start, start), min(segments[i].stop, stop)
                if low < high:
                    begin = segments[i].start
                    yield i, slice(low - begin, high - begin), numbers[:, low - start : high - start]


@dataclass(frozen=True)
class _Attention:
    """One call: queries, and results of which each segment's are written when its run is computed.

    Attributes:
        query: [segments, planes of keys, rows, width], scaled, to meet planes of numbers.
        query_sums: [segments, rows], of the scaled queries.
        bias: [segments, rows], scaled, or None.
        keys: all keys.
        values: all values.
        softcap: as in ragged attention.
        sums: [segments, planes of values, rows, width], weighted sums of the values' numbers.
        zeros: [segments, rows], weighted sums of the values' zeros.
        peaks: [segments, rows], the largest logits.
        shares: [segments, rows], the largest weights.
        buffer: a tile of numbers.
    """

    query: Tensor
    query_sums: Tensor
    bias: Tensor | None
    keys: _Rows
    values: _Rows
    softcap: float | None
    sums: Tensor
    zeros: Tensor
    peaks: Tensor
    shares: Tensor
    buffer: Tensor

    @classmethod
    def of(cls, query: Tensor, bias: Tensor | None, keys: Codes, values: Codes, softcap: float | None) -> _Attention:
        """Prepares a call; ``query`` is [segments, rows, head_dim], scaled."""
        of_keys, of_values = (_Rows.of(codes, query) for codes in (keys, values))
        planes = query.unflatten(-1, (len(of_keys.factors), -1)).transpose(1, 2) * of_keys.factors
        n_planes = len(of_values.factors)
        sums = query.new_zeros(len(query), n_planes, query.shape[1], values.shape[1] // n_planes)
        zeros, peaks, shares = (query.new_full(query.shape[:2], x) for x in (0.0, -torch.inf, 1.0))
        n_numbers = max(TILE_BYTES // query.element_size(), keys.shape[1], values.shape[1])
        buffer = query.new_empty(n_numbers)
        query_sums = query.sum(-1)
        return cls(planes, query_sums, bias, of_keys, of_values, softcap, sums, zeros, peaks, shares, buffer)

    def run(self, rows: slice, run: range, segments: Sequence[slice]) -> None:
        """Computes attention of some query rows of each segment to the pairs of a run of segments."""
        offset = segments[run[0]].start
        n_rows = rows.stop - rows.start
        memory = self.query.new_empty((segments[run[-1]].stop - offset) * n_rows)
        logits = {
            i: memory[(segments[i].start - offset) * n_rows : (segments[i].stop - offset) * n_rows].view(n_rows, -1)
            for i in run
            if segments[i].start < segments[i].stop
        }
        for i, pairs, numbers in self.keys.tiles(run, segments, self.buffer):
            part, query = logits[i][:, pairs], self.query[i, :, rows]
            torch.mm(query[0], numbers[0].T, out=part)
            for plane in range(1, len(numbers)):
                part.addmm_(query[plane], numbers[plane].T)
        weights = {i: self.weights(i, rows, segments[i], of_segment) for i, of_segment in logits.items()}
        for i, pairs, numbers in self.values.tiles(run, segments, self.buffer):
            part = weights[i][:, pairs]
            for plane, of_plane in enumerate(numbers):
                self.sums[i, plane, rows].addmm_(part, of_plane)

    def weights(self, i: int, rows: slice, pairs: slice, logits: Tensor) -> Tensor:
        """Returns the weights of a segment's pairs, times their values' scales, in the memory of its logits."""
        if self.keys.scale is not None:
            logits *= self.keys.scale[pairs]
        if self.keys.zero is not None:
            logits.addcmul_(self.query_sums[i, rows].unsqueeze(-1), self.keys.zero[pairs])
        if self.bias is not None:
            logits += self.bias[i, rows].unsqueeze(-1)
        softcapped(logits, self.softcap)
        torch.amax(logits, 1, out=self.peaks[i, rows])
        torch.softmax(logits, 1, out=logits)
        torch.amax(logits, 1, out=self.shares[i, rows])
        if self.values.zero is not None:
            torch.mv(logits, self.values.zero[pairs], out=self.zeros[i, rows])
        if self.values.scale is not None:
            logits *= self.values.scale[pairs]
        return logits

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns out [segments, rows, value_head_dim] and lse [segments, rows]."""
        out = (self.sums * self.values.factors).transpose(1, 2).flatten(2)
        if self.values.zero is not None:
            out += self.zeros.unsqueeze(-1)
        return out, self.peaks - self.shares.log()  # the largest weight is exp(peak - lse)
