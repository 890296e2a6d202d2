"""Attention to encoded pairs, decoded tile by tile: never more than a tile of them is there in the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvzip_press.cache.codecs.storage import Attended
from kvzip_press.kernels.dense_attention import merge_attention
from kvzip_press.kernels.ragged_attention import ragged_attention

TILE = 16384  # pairs that are decoded at a time

Decode = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]


def attend_in_tiles(
    query: torch.Tensor,
    decode: Decode,
    n_pairs: int,
    cu_seqlens: torch.Tensor,
    tail_keys: torch.Tensor | None,
    tail_values: torch.Tensor | None,
    *,
    tail_mask: torch.Tensor | None = None,
    tail_length: torch.Tensor | None = None,
    return_lse: bool = False,
    context_query: torch.Tensor | None = None,
    **options: Any,
) -> Attended:
    """Computes what :func:`kvzip_press.kernels.ragged_attention.ragged_attention` does, over pairs that are encoded.

    Args:
        query: ``[batch, num_attention_heads, query_length, head_dim]``.
        decode: Returns keys ``[n, head_dim]`` and values ``[n, v_head_dim]`` of a stretch of the packed pairs.
        n_pairs: Number of packed pairs.
        cu_seqlens: Where the segment of each (row, head) begins.
        tail_keys: ``[batch, num_heads, length, head_dim]``; None for no tail.
        tail_values: ``[batch, num_heads, length, v_head_dim]``.
        tail_mask: Which rows see which tail tokens.
        tail_length: How many tail tokens are live.
        return_lse: Whether to return the log-sum-exp too.
        context_query: What attends to the packed pairs, if that is not what attends to the tail.
        options: Further options of ragged attention.
    """
    nothing = (None, None) if tail_keys is None or tail_values is None else (tail_keys[:, :, :0], tail_values[:, :, :0])
    with_tail: dict[str, Any] = {"tail_mask": tail_mask, "tail_length": tail_length}
    # Without looking: on a GPU it would wait. The pairs of a pool are those of all layers.
    begin, end = cu_seqlens[[0, -1]].tolist() if cu_seqlens.device.type == "cpu" else (0, n_pairs)
    tiles = [slice(start, min(start + TILE, end)) for start in range(begin, end, TILE)]
    if not tiles or context_query is not None:
        tiles.append(slice(n_pairs, n_pairs))  # nothing of the packed pairs, for the tail alone
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for tile in tiles:
        is_last = tile is tiles[-1]
        part = ragged_attention(
            query if is_last or context_query is None else context_query,
            *decode(tile),
            cu_seqlens.clamp(tile.start, tile.stop) - tile.start,
            *((tail_keys, tail_values) if is_last else nothing),
            return_lse=True,
            **(with_tail if is_last else {}),
            **options,
        )
        assert isinstance(part, tuple)
        merged = part if merged is None else merge_attention(*merged, *part)
    assert merged is not None
    return merged if return_lse else merged[0]


def segments_of(cu_seqlens: torch.Tensor, pairs: slice) -> torch.Tensor:
    """Returns the segment of each of the packed pairs ``pairs``, int64 ``[n]``; any for one that is in none."""
    index = torch.arange(pairs.start, pairs.stop, device=cu_seqlens.device)
    found = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    return found.clamp(max=len(cu_seqlens) - 2)
