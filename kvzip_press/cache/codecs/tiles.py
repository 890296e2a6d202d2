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
        options: Further options of ragged attention.
    """
    tail = (tail_keys, tail_values)
    nothing = (None, None) if tail_keys is None or tail_values is None else (tail_keys[:, :, :0], tail_values[:, :, :0])
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, max(n_pairs, 1), TILE):
        stop = min(start + TILE, n_pairs)
        own = {"tail_mask": tail_mask, "tail_length": tail_length} if stop == n_pairs else {}
        part = ragged_attention(
            query,
            *decode(slice(start, stop)),
            cu_seqlens.clamp(start, stop) - start,
            *(tail if stop == n_pairs else nothing),
            return_lse=True,
            **own,
            **options,
        )
        assert isinstance(part, tuple)
        merged = part if merged is None else merge_attention(*merged, *part)
    assert merged is not None
    return merged if return_lse else merged[0]
