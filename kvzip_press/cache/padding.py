"""Rows of different lengths side by side: padding is on the left of a row, so that all rows end in the same column."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvzip_press.errors import InvalidArgumentError


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids ``[batch, longest]``, int64, 0 at padding, and a bool mask of the same shape, False at padding."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) >= longest - lengths[:, None]


def padding_in(attention_mask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """Returns the number of columns of padding on the left of each row, int64 ``[batch]``; None if no row has any.

    Args:
        attention_mask: ``[batch, n]``, 0 or False at padding.
        shape: ``(batch, n)``, the shape that the mask must have.

    Raises:
        InvalidArgumentError: The mask has another shape, padding elsewhere than on the left, or a row of padding only.
    """
    if tuple(attention_mask.shape) != shape:
        raise InvalidArgumentError(f"expected an attention_mask of shape {shape}, got {tuple(attention_mask.shape)}")
    valid = attention_mask.bool()
    if not bool(valid[:, -1].all()) or bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise InvalidArgumentError("expected padding on the left of a row only, and a token in every row")
    padding = (~valid).sum(dim=1)
    return padding if bool(padding.any()) else None


def visible_columns(padding: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Returns a mask, bool ``[batch, n_columns]``, False at the padding on the left."""
    return torch.arange(n_columns, device=padding.device) >= padding[:, None]


def moved_over_padding(tokens: torch.Tensor, n_before: int, padding: torch.Tensor) -> torch.Tensor:
    """Moves each row's earlier tokens over the padding of the block that follows, so that no gap stays between the two.

    Args:
        tokens: ``[batch, num_heads, columns, head_dim]``: the earlier tokens, then the block.
        n_before: Columns before the block.
        padding: int64 ``[batch]``, columns of padding on the left of the block.

    Returns:
        A new tensor of the same shape; the padding on the left has arbitrary content.
    """
    columns = torch.arange(tokens.shape[2], device=tokens.device)
    shifts = padding.to(tokens.device)[:, None]
    return columns_taken(tokens, columns - shifts * (columns < n_before + shifts))


def ends_dropped(tokens: torch.Tensor, counts: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Drops ``counts`` ``[batch]`` tokens from the end of each row; right-aligns the rest in ``n_columns`` columns."""
    first = tokens.shape[2] - n_columns - counts.to(tokens.device)[:, None]
    return columns_taken(tokens, first + torch.arange(n_columns, device=tokens.device))


def columns_taken(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns a tensor whose column i in each row is column ``index[row, i]``.

    Columns before the first one are padding, of arbitrary content.
    """
    index = index.clamp(min=0)[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
    return tokens.gather(2, index)


def first_tokens(valid: torch.Tensor, n: int) -> torch.Tensor:
    """Returns a mask of the first ``n`` tokens of each row, bool like ``valid`` ``[batch, span]``, False at padding."""
    return valid & (valid.long().cumsum(dim=-1) <= n)
