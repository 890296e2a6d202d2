"""The features that gates are trained with: a document's hidden states as it is read, and KVzip's scores of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.press import Press
from kvzip_press.registry import get_press

Layers = dict[int, torch.Tensor]


def teacher(weighting: str | None = None) -> Press:
    """Returns the press whose scores gates learn: KVzip by full replay, with its rows weighted or not."""
    return get_press("kvzip", weighting=weighting)


def features_of(
    model: nn.Module, tokenizer: Any, ids: list[int], weighting: str | None = None
) -> tuple[Layers, Layers]:
    """Computes one document's features, without the chat template's prefix, on the CPU.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        ids: The document.
        weighting: How the teacher weighs its rows; see :class:`kvzip_press.KVzipPress`.

    Returns:
        ``layer_idx -> [n, hidden_size]`` and ``layer_idx -> [num_key_value_heads, n]``, KVzip's scores in fp32.
    """
    hidden: Layers = {}

    def keep(layer_idx: int, hidden_states: torch.Tensor) -> None:
        hidden[layer_idx] = hidden_states[0, -len(ids) :].cpu()

    taught_by = teacher(weighting)
    with watching_hidden_states(model, keep):
        done = prefill(model, tokenizer, ids, observers=[taught_by])
    scores = taught_by.score(done).layers
    return hidden, {layer_idx: layer[0, :, -len(ids) :].cpu() for layer_idx, layer in scores.items()}


def layer_indices(model: nn.Module) -> tuple[int, ...]:
    """Returns the indices of the layers that have gates."""
    return tuple(layer.layer_idx for layer in full_attention_layers(model))
