"""Layers whose heads are handled together, as those of one: few operations, however many layers there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

NUMBERS_AT_ONCE = 2**24  # of the tensors that are joined: layers of a long context are handled one by one


def by_head(
    change: Callable[..., tuple[torch.Tensor, ...]],
    layers: Mapping[int, torch.Tensor],
    *others: Mapping[int, torch.Tensor],
) -> tuple[dict[int, torch.Tensor], ...]:
    """Applies a function that looks at each head alone.

    Args:
        change: Function of tensors ``[batch, heads, ...]`` that returns one or more others.
        layers: ``layer_idx -> [batch, heads, ...]``, its first argument; at least one layer.
        others: Its other arguments, of the same layers on the same devices.

    Returns:
        ``layer_idx -> [batch, heads, ...]``, for each tensor that the function returns.
    """
    changed: list[tuple[int, tuple[torch.Tensor, ...]]] = []
    for group in _groups(layers):
        if len(group) == 1:
            changed.append((group[0], change(*(each[group[0]] for each in (layers, *others)))))
            continue
        joined = [torch.cat([each[i] for i in group], dim=1) for each in (layers, *others)]
        n_heads = [layers[i].shape[1] for i in group]
        # As a layer handled alone has them: with several rows, parts of the joined tensor lie apart in memory.
        parts = ([part.contiguous() for part in tensor.split(n_heads, dim=1)] for tensor in change(*joined))
        changed += zip(group, zip(*parts, strict=True), strict=True)
    return tuple({i: parts[number] for i, parts in changed} for number in range(len(changed[0][1])))


def _groups(layers: Mapping[int, torch.Tensor]) -> list[list[int]]:
    """Returns runs of layers on one device that are of one shape but for their heads, and small together."""
    groups: list[list[int]] = []
    kind, size = None, 0
    for i, tensor in layers.items():
        own = tensor.device, tensor.dtype, tensor.shape[0], tensor.shape[2:]
        size += tensor.numel()
        if own != kind or size > NUMBERS_AT_ONCE:
            groups.append([])
            kind, size = own, tensor.numel()
        groups[-1].append(i)
    return groups
