"""Runs kvpress's presses with a context of their own (KVzip, KVgrad, FastKVzip, KVCompose), and reads their result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import attach
from kvzip_press.errors import UnsupportedModelError
from kvzip_press.model.structure import attention_layers, full_attention_layers, text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.model.watching import after_forward
from kvzip_press.presses.kvpress_adapter.importing import kvpress
from kvzip_press.presses.kvpress_adapter.keep_masks import Pairs, kept_pairs
from kvzip_press.presses.kvpress_adapter.refused import REFUSALS, as_ours

if TYPE_CHECKING:
    from kvzip_press.presses.kvpress_adapter.wrapped import WrappedPress


@torch.no_grad()
def run_native(
    press: WrappedPress, model: nn.Module, input_ids: torch.Tensor, tokenizer: Any
) -> dict[int, list[torch.Tensor]]:
    """Reads a context under the press, in a cache that is thrown away.

    Args:
        press: The press.
        model: The model, which is left as it is: all happens on a twin.
        input_ids: ``[1, n]``.
        tokenizer: The tokenizer for a press that loads one from the model's path; if None, the press loads its own.

    Returns:
        ``layer_idx -> [[num_key_value_heads, n]]``, bool: the pairs kept.

    Raises:
        InvalidArgumentError: The press refused the model or the input.
        UnsupportedModelError: The model has sliding layers, which these presses would take for full ones, or layers
            that read others' pairs, which these presses would evict as well.
    """
    layers = attention_layers(model)
    if not all(layer.is_full and layer.shares_with is None for layer in layers):
        raise UnsupportedModelError(
            f"{press!r} counts every layer as a full one with pairs of its own: expected a model without sliding "
            "layers, outside of share_layers(...)"
        )
    attach(model)
    twin = twin_of(model)  # kvpress leaves masks and hooks on modules
    decoder: Any = text_decoder(twin)
    cache = compat.DynamicCache(config=decoder.config)
    dense: dict[int, Pairs] = {}
    with _path_of(twin, press.press, tokenizer), _dense_pairs(twin, cache, dense):
        try:
            with press.prepared(model)(twin):
                decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)
        except REFUSALS as error:
            raise as_ours(repr(press), error) from error
        if isinstance(press.press, kvpress().KVComposePress):
            _forget_replay(cache, input_ids.shape[1])
        return {
            layer.layer_idx: [_kept(layer.module, dense[layer.layer_idx], cache.layers[layer.layer_idx], press)]
            for layer in full_attention_layers(twin)
        }


def _kept(module: nn.Module, dense: Pairs, layer: Any, press: WrappedPress) -> torch.Tensor:
    masked = getattr(module, "masked_key_indices", None)
    return kept_pairs(dense, (layer.keys, layer.values), masked, type(press.press).__name__)


def _forget_replay(cache: Any, n: int) -> None:
    """Removes the replayed tokens that kvpress's KVCompose leaves after the context without ``structured``."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :n], layer.values[:, :, :n]


@contextmanager
def _dense_pairs(model: nn.Module, cache: Any, dense: dict[int, Pairs]) -> Iterator[None]:
    """While open, records every layer's pairs as the first forward left them, before a press sees them."""

    def note(module: nn.Module, *_: Any) -> None:
        layer = cache.layers[module.layer_idx]
        dense.setdefault(int(module.layer_idx), (layer.keys, layer.values))  # type: ignore[arg-type]

    with ExitStack() as stack:
        for layer in full_attention_layers(model):
            layer.module.__dict__["masked_key_indices"] = None  # the masks of another run are not this one's
            stack.enter_context(after_forward(layer.module, note))
        yield


@contextmanager
def _path_of(model: Any, press: Any, tokenizer: Any) -> Iterator[None]:
    """While open, the model's path is a folder with the given tokenizer, as KVzip loads its tokenizer from there."""
    if tokenizer is None or not isinstance(press, kvpress().KVzipPress):
        yield
        return
    before = model.config.name_or_path
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        model.config.name_or_path = folder
        try:
            yield
        finally:
            model.config.name_or_path = before
