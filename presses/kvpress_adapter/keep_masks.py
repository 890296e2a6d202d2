"""Turns what a kvpress press did to one row of one layer into a mask of the pairs that it kept."""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press.errors import InvalidArgumentError

Pairs = tuple[torch.Tensor, torch.Tensor]


def kept_pairs(dense: Pairs, left: Pairs, masked: Any, name: str) -> torch.Tensor:
    """Returns which pairs a press kept.

    Args:
        dense: Keys and values before the press, ``[1, heads, n, head_dim]``.
        left: Keys and values that the press left.
        masked: ``module.masked_key_indices``: indices (row, head, position) of the pairs to hide; or None.
        name: Name of the press, for messages.

    Returns:
        ``[heads, n]``, bool, True at pairs that were kept.

    Raises:
        InvalidArgumentError: The press did anything other than evict pairs, did so in two ways at once, or kept a pair
            whose position cannot be told.
    """
    keys = dense[0]
    unchanged = keys.shape == left[0].shape and torch.equal(keys, left[0]) and torch.equal(dense[1], left[1])
    if not unchanged and masked is not None:
        raise InvalidArgumentError(f"{name} both gathers and masks pairs: the masked ones cannot be told any more")
    keep = torch.ones(keys.shape[1:3], dtype=torch.bool, device=keys.device)
    if masked is not None:
        _, heads, positions = (torch.as_tensor(index, device=keys.device) for index in masked)
        keep[heads, positions] = False
    elif not unchanged:
        for head in range(keys.shape[1]):
            index = _rows_of(_bits(dense, head), _bits(left, head), name)
            keep[head] = False
            keep[head, index] = True
    return keep


def _bits(pairs: Pairs, head: int) -> torch.Tensor:
    """Returns keys and values of a head side by side, as integers, ``[n, head_dim + v_head_dim]``."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[pairs[0].element_size()]
    return torch.cat([part[0, head].contiguous().view(integer) for part in pairs], dim=-1).long()


def _rows_of(dense: torch.Tensor, left: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the index in ``dense`` of each row of ``left``, ``[kept]``.

    Rows are found by a 64-bit sum, then compared bit by bit.
    """
    if dense.shape[1] != left.shape[1]:
        raise InvalidArgumentError(f"{name} changes the head dimension, which is not eviction")
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (dense.shape[1],), generator=generator).to(dense.device)
    digests, order = (dense * weights).sum(dim=-1).sort()
    wanted = (left * weights).sum(dim=-1)
    first = torch.searchsorted(digests, wanted).clamp(max=len(digests) - 1)
    index = order[first]
    if not torch.equal(dense[index], left):
        raise InvalidArgumentError(f"{name} changes keys or values (merges, rotates, adds ...), which is not eviction")
    following = digests[(first + 1).clamp(max=len(digests) - 1)]
    alike = (following == wanted) & (first + 1 < len(digests))
    if bool(alike.any()) or index.unique().numel() != index.numel():
        raise InvalidArgumentError(f"{name} kept a pair that the cache holds more than once: its position is unknown")
    return index
