"""The features that gates are trained with: a document's hidden states as it is read, and KVzip's scores of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.registry import get_press

Layers = dict[int, torch.Tensor]


def features_of(model: nn.Module, tokenizer: Any, ids: list[int]) -> tuple[Layers, Layers]:
    """Computes one document's features, without the chat template's prefix, on the CPU.

    Returns:
        ``layer_idx -> [n, hidden_size]`` and ``layer_idx -> [num_key_value_heads, n]``, KVzip's scores in fp32.
    """
    hidden: Layers = {}

    def keep(layer_idx: int, hidden_states: torch.Tensor) -> None:
        hidden[layer_idx] = hidden_states[0, -len(ids) :].cpu()

    with watching_hidden_states(model, keep):
        done = prefill(model, tokenizer, ids)
    scores = teacher_scores(done)
    return hidden, {layer_idx: layer[0, :, -len(ids) :].cpu() for layer_idx, layer in scores.items()}


def teacher_scores(done: Prefill) -> Layers:
    """Returns KVzip's scores ``layer_idx -> [1, num_key_value_heads, n]``, by full replay: the gates' target."""
    return dict(get_press("kvzip").score(done).layers)


def layer_indices(model: nn.Module) -> tuple[int, ...]:
    """Returns the indices of the layers that have gates."""
    return tuple(layer.layer_idx for layer in full_attention_layers(model))
