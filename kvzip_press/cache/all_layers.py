"""What is done to all layers of a compressed cache: it is done to every one of them, or to none.

A cache is moved as a whole: many can wait in host memory, with only the one in use on the GPU. Moving it layer by layer
in every forward, as transformers' offloaded caches do, would move at each decode step what eviction has made small
enough to stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press.cache.padded_block import drop_ends_of_sliding
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.sliding_windows import own_window
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.model.devices import execution_device, reachable
from kvzip_press.model.structure import attention_layers, text_decoder
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.sharing.layer import SharedLayer, holding


@contextmanager
def all_or_nothing(cache: Any) -> Iterator[None]:
    """Gives the layers of a cache back what they held if what happens inside ends with an error or an interrupt.

    Layers replace their tensors, or write behind the tokens that they hold, so nothing has to be copied. Pairs in a
    pool are the exception: an eviction writes into them. It is the last thing that a forward does, so the layers are
    left as they are behind it.
    """
    layers: list[Any] = getattr(cache, "layers", [])
    before = [(layer, dict(vars(layer)), _tail_of(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        if not any(_was_evicted(layer, held) for layer, held, _ in before):
            layers[:] = [layer for layer, _, _ in before]
            for layer, held, tail in before:
                vars(layer).clear()
                vars(layer).update(held)
                if isinstance(layer, RaggedLayer):
                    vars(layer.tail).update(tail)
        raise


def _tail_of(layer: Any) -> dict[str, Any]:
    return dict(vars(layer.tail)) if isinstance(layer, RaggedLayer) else {}


def _was_evicted(layer: Any, held: dict[str, Any]) -> bool:
    return isinstance(layer, RaggedLayer) and layer.packed.pool is not None and layer.packed is not held["packed"]


def truncate_columns(cache: Any, n_columns: int) -> None:
    """Forgets every column from ``n_columns`` on, in each layer as far as it has read.

    Raises:
        InvalidArgumentError: Fewer were seen, the cut reaches into the compressed context, or a sliding layer has lost
            what it would need.
    """
    n_seen, layers = cache.get_seq_length(), holding(cache.layers)
    if n_columns > n_seen:
        raise InvalidArgumentError(f"expected at most the {n_seen} tokens seen, got {n_columns}")
    surplus = [layer.get_seq_length() - n_columns for layer in layers]
    for layer, excess in zip(layers, surplus, strict=True):
        if excess > 0:
            _check_holds_all(layer)
    with all_or_nothing(cache):
        for layer, excess in zip(layers, surplus, strict=True):
            if excess > 0:
                layer.crop(-excess)
                own_window(layer)


def truncate_rows(cache: Any, ragged: RaggedLayer, n_seen: Sequence[int]) -> None:
    """Truncates every row to its own number of tokens, and drops columns that are padding in every row.

    Args:
        cache: The cache.
        ragged: Any ragged layer of it.
        n_seen: Tokens seen, for each batch row.

    Raises:
        InvalidArgumentError: There is another number of rows, a row has seen fewer tokens, or a layer cannot go back.
    """
    if len(n_seen) != ragged.batch_size:
        raise InvalidArgumentError(f"expected a number for each of {ragged.batch_size} rows, got {len(n_seen)}")
    layers = holding(cache.layers)
    if len({layer.get_seq_length() for layer in layers}) > 1:
        raise InvalidArgumentError("expected layers that have seen the same tokens, but a forward failed half-way")
    seen = ragged.n_context + ragged.n_tail_tokens
    counts = seen - torch.tensor(n_seen, device=seen.device)
    if bool((counts < 0).any()):
        raise InvalidArgumentError(f"expected at most the {seen.tolist()} tokens seen, got {list(n_seen)}")
    with all_or_nothing(cache):
        for layer in layers if bool(counts.any()) else ():
            _check_holds_all(layer)
        for layer in layers:
            if isinstance(layer, RaggedLayer):
                layer.drop_ends(counts)
        for layer in layers:
            if not isinstance(layer, RaggedLayer):
                drop_ends_of_sliding(layer, counts, n_columns=ragged.get_seq_length())


def _check_holds_all(layer: Any) -> None:
    window = getattr(layer, "sliding_window", None)
    if window is not None and layer.get_seq_length() >= window:
        raise InvalidArgumentError(
            f"a sliding layer holds only its last {window} tokens and cannot go back: expected a fork() made "
            "before the tokens that are to be forgotten"
        )


def move_layers(cache: Any, target: torch.device | str | nn.Module) -> None:
    """Moves the layers of a compressed cache in place; forks keep the tensors that they share with it where they are.

    Args:
        cache: A cache of ragged layers, and any dense or sliding ones beside them.
        target: A device for all layers, or the model that made them, which sends each layer to the device of its own.

    Raises:
        CacheMismatchError: The model does not have attention in just these layers.
        InvalidArgumentError: There is no such device.
        UnsupportedCacheError: A layer holds no keys and values.
    """
    layers: list[Any] = cache.layers
    devices = _devices(layers, target)
    for layer in holding(layers):
        if not isinstance(layer, RaggedLayer) and not isinstance(getattr(layer, "keys", None), torch.Tensor):
            raise UnsupportedCacheError(f"expected layers that hold keys and values, got {type(layer).__name__}")
    with all_or_nothing(cache):
        for layer, device in zip(layers, devices, strict=True):
            _move(layer, device)


def _devices(layers: Sequence[Any], target: torch.device | str | nn.Module) -> list[torch.device]:
    if not isinstance(target, nn.Module):
        return [reachable(target)] * len(layers)
    by_idx = {layer.layer_idx: layer.module for layer in attention_layers(target)}
    if sorted(by_idx) != list(range(len(layers))):
        raise CacheMismatchError(
            f"expected a model with attention in {len(layers)} layers, got layers {sorted(by_idx)}"
        )
    return [execution_device(by_idx[index]) for index in range(len(layers))]


def _move(layer: Any, device: torch.device) -> None:
    if isinstance(layer, RaggedLayer):
        layer.move_to(device)
    elif not isinstance(layer, SharedLayer):
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        layer.device = device


def tensors_of(layer: Any) -> tuple[torch.Tensor, ...]:
    """Returns every tensor that a layer of any kind holds."""
    if isinstance(layer, RaggedLayer):
        return layer.tensors
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return tuple(tensor for tensor in held if isinstance(tensor, torch.Tensor))


def config_of(layers: Mapping[int, RaggedLayer], model: nn.Module | None) -> Any:
    """Returns the config of the model that made ragged layers, at least one, which are given by their indices.

    Raises:
        CacheMismatchError: ``model`` did not make them.
        InvalidArgumentError: The original model object is gone, and none is given.
    """
    if model is not None:
        weights = weights_fingerprint(text_decoder(model))
        by_idx = {layer.layer_idx: layer.module for layer in attention_layers(model)}
        for layer_idx, layer in layers.items():
            if layer_idx not in by_idx:
                raise CacheMismatchError(f"expected a model with attention in layer {layer_idx}, got one without")
            layer.check_module(by_idx[layer_idx], again=True, weights=weights)
    known = next(iter(layers.values()))._known_module()  # noqa: SLF001  # the layer and its cache
    if known is None:
        raise InvalidArgumentError("expected save(..., model=...), got no model, and the one of the cache is gone")
    config: Any = known.config
    return config
