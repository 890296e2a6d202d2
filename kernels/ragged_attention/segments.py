"""Ragged attention of many query rows (a chunk of a prefill): dense attention per segment, merged with the tail.

With hundreds of rows a segment fills a GPU, and the speed of matrix products decides, at which dense kernels are best.
cuDNN's is not used: it plans anew for every length, 80 ms each, and no two segments are equally long. The host reads
the lengths once per call. Codes are decoded a tile at a time, which the rows share.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kvzip_press.kernels.dense_attention import aten
from kvzip_press.kernels.dense_attention.merge import merge_attention
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.tail import tail_attention
from kvzip_press.kernels.row_codec import Codes, decode_rows

MIN_QUERY_LENGTH = 256
MIN_CODED_LENGTH = 32  # on a CPU: fewer rows are too few for what decoding costs
TILE_PAIRS = 8192


def reason_against(inputs: RaggedInputs, softcap: float | None) -> str | None:
    """Returns why this implementation cannot do this input, or None if it can."""
    query_length = inputs.query.shape[2]
    coded = isinstance(inputs.keys, Codes)
    least = MIN_CODED_LENGTH if coded and inputs.query.device.type == "cpu" else MIN_QUERY_LENGTH
    if query_length < least:
        return f"there are {query_length} query rows, not {least} or more"
    if inputs.tail_mask is not None or softcap is not None:
        return "a mask or a softcap is given"
    if not coded:
        return aten.reason_against_flash(inputs.query, *inputs.dense)
    if inputs.keys.shape[0] == 0 or inputs.keys.shape[1] != inputs.values.shape[1]:
        return "there are no pairs, or keys and values have different widths"
    return aten.reason_against_flash(inputs.query, inputs.query, inputs.query)


def ragged_attention(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only."""
    assert softcap is None, "see reason_against"
    inputs = inputs.with_live_tail()
    query = inputs.query
    groups = inputs.query_of_context.unflatten(1, (inputs.num_key_value_heads, -1)).flatten(0, 1).unsqueeze(1).unbind(0)
    results = [_attend(rows, tiles, scaling) for rows, tiles in zip(groups, _segments(inputs), strict=True)]
    out, lse = (
        torch.cat(tensors).view(*query.shape[:2], *tensors[0].shape[2:]) for tensors in zip(*results, strict=True)
    )
    if inputs.context_bias is not None:
        lse += inputs.context_bias * scaling
    tail = tail_attention(inputs, scaling=scaling, softcap=None)
    return (out, lse) if tail is None else merge_attention(out, lse, *tail)


_Tiles = Iterable[tuple[Tensor, Tensor]]


def _segments(inputs: RaggedInputs) -> Iterator[_Tiles]:
    """Yields the tiles of each segment: keys and values [1, 1, n, head_dim] in the dtype of the query."""
    if not isinstance(inputs.keys, Codes):
        yield from ([pair] for pair in inputs.segments())
        return
    for pair in inputs.segment_codes():
        yield _decoded(*pair, inputs.query.dtype)


def _decoded(keys: Codes, values: Codes, dtype: torch.dtype) -> _Tiles:
    for start in range(0, keys.shape[0], TILE_PAIRS):
        tile = slice(start, start + TILE_PAIRS)
        yield decode_rows(keys[tile], dtype)[None, None], decode_rows(values[tile], dtype)[None, None]


def _attend(query: Tensor, tiles: _Tiles, scaling: float) -> tuple[Tensor, Tensor]:
    """Attends to one segment: query [1, groups, rows, head_dim]; 0 and -inf if it has no pairs."""
    merged: tuple[Tensor, Tensor] | None = None
    for keys, values in tiles:
        if keys.shape[2] == 0:
            continue
        result = aten.uncovered(query, keys, values, scaling)
        merged = result if merged is None else merge_attention(*merged, *result)
    if merged is not None:
        return merged
    no_lse = query.new_full(query.shape[:3], -torch.inf, dtype=accumulation_dtype(query.dtype))
    return torch.zeros_like(query), no_lse
