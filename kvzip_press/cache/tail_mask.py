"""Converts the mask that a model's attention implementation was built for to a mask over a ragged layer's tail."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from kvzip_press.cache.padding import visible_columns
from kvzip_press.errors import InvalidArgumentError


def tail_mask(
    attention_mask: Any, *, query_length: int, tail_length: int, padding: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Returns which tail keys every query can see.

    Args:
        attention_mask: None (causal), a 2-D padding mask ``[batch, >= tail_length]`` (flash attention), a 4-D bool or
            additive mask ``[batch, heads or 1, query_length, >= tail_length]`` (sdpa, eager) or a BlockMask (flex). Its
            last ``tail_length`` columns are the tail: a ragged layer reports only these to the mask builder.
        query_length: Number of new tokens, which are already appended to the tail.
        tail_length: Number of tokens of the tail, including the new ones.
        padding: int64 ``[batch]``, the number of columns on the left of the tail that are padding, which are hidden
            whatever the mask says; None for none.

    Returns:
        Bool ``[batch or 1, heads or 1, query_length, tail_length]``, True where visible; None means lower-right causal.

    Raises:
        InvalidArgumentError: The mask has another shape, or adds a bias that is neither 0 nor minus infinity.
    """
    if padding is not None:
        visible = tail_mask(attention_mask, query_length=query_length, tail_length=tail_length)
        visible = causal_mask(query_length, tail_length, padding.device) if visible is None else visible
        return visible & visible_columns(padding, tail_length)[:, None, None]
    if attention_mask is None:
        return None
    if isinstance(attention_mask, BlockMask):
        return _from_block_mask(attention_mask, query_length, tail_length)
    if attention_mask.dim() == 2 and attention_mask.shape[1] >= tail_length:
        visible = attention_mask[:, None, None, -tail_length:].bool()
        return visible & causal_mask(query_length, tail_length, attention_mask.device)
    if attention_mask.dim() == 4 and attention_mask.shape[-1] >= tail_length:
        return _as_bool(attention_mask[:, :, -query_length:, -tail_length:])
    raise InvalidArgumentError(
        f"expected a mask whose last dimension holds at least the {tail_length} tail tokens (2-D or 4-D), "
        f"got shape {tuple(attention_mask.shape)}"
    )


def causal_mask(query_length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """Returns the lower-right causal mask, bool ``[query_length, key_length]``: the last query sees every key."""
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - query_length)


def _as_bool(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise InvalidArgumentError("expected an additive mask of zeros and minus infinity, got one with other biases")
    return visible


def _from_block_mask(mask: BlockMask, query_length: int, tail_length: int) -> torch.Tensor:
    batch, heads, rows, columns = mask.shape
    device = str(mask.kv_num_blocks.device)
    dense: torch.Tensor = create_mask(mask.mask_mod, batch, heads, rows, columns, device=device)
    return dense[:, :, -query_length:, -tail_length:]
