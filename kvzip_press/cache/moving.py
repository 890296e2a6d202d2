"""Moves compressed caches between devices: many can wait in host memory, with only the one in use on the GPU.

A cache is moved as a whole. Moving it layer by layer in every forward, as transformers' offloaded caches do, would move
at each decode step what eviction has made small enough to stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError
from kvzip_press.model.devices import execution_device
from kvzip_press.model.structure import attention_layers


def move_layers(layers: Sequence[Any], target: torch.device | str | nn.Module) -> None:
    """Moves the layers of a compressed cache in place; forks keep the tensors that they share with it where they are.

    Args:
        layers: Ragged layers, and any dense or sliding ones beside them.
        target: A device for all layers, or the model that made them, which sends each layer to the device of its own.

    Raises:
        CacheMismatchError: The model does not have attention in just these layers.
        UnsupportedCacheError: A layer holds no keys and values.
    """
    devices = _devices(layers, target)
    for layer in layers:
        if not isinstance(layer, RaggedLayer) and not isinstance(getattr(layer, "keys", None), torch.Tensor):
            raise UnsupportedCacheError(f"expected layers that hold keys and values, got {type(layer).__name__}")
    for layer, device in zip(layers, devices, strict=True):
        _move(layer, device)


def _devices(layers: Sequence[Any], target: torch.device | str | nn.Module) -> list[torch.device]:
    if not isinstance(target, nn.Module):
        return [torch.device(target)] * len(layers)
    by_idx = {layer.layer_idx: layer.module for layer in attention_layers(target)}
    if sorted(by_idx) != list(range(len(layers))):
        raise CacheMismatchError(
            f"expected a model with attention in {len(layers)} layers, got layers {sorted(by_idx)}"
        )
    return [execution_device(by_idx[index]) for index in range(len(layers))]


def _move(layer: Any, device: torch.device) -> None:
    if isinstance(layer, RaggedLayer):
        layer.move_to(device)
    else:
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        layer.device = device
