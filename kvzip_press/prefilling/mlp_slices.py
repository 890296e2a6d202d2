"""Runs MLPs slice by slice: their activations take the most memory in a forward of a few thousand tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MAX_SLICES = 3  # with this many, the hidden states around an MLP take as much memory as its activations
MIN_ROWS = 1024  # fewer would leave a large GPU idle


def mlps_of(decoder: nn.Module) -> list[nn.Module]:
    """Returns the ``mlp`` of each decoder layer that has one."""
    layers: Any = decoder.layers
    found = (getattr(layer, "mlp", None) for layer in layers)
    return [mlp for mlp in found if isinstance(mlp, nn.Module)]


def slice_mlps(decoder: nn.Module, min_rows: int = MIN_ROWS) -> None:
    """Makes the MLPs of a twin compute their tokens in up to `MAX_SLICES` slices, one by one.

    A gated MLP holds three tensors ``[rows, intermediate_size]`` at once. It treats each token separately, so the
    result is the same up to rounding, which depends on the shapes of matrices. An ``mlp`` that returns anything other
    than a tensor of its input's shape (with router logits, say) runs unsliced. For forwards without gradients.

    Args:
        decoder: The module with the ``layers``: a twin (:func:`kvzip_press.model.twin.twin_of`), which stays so.
        min_rows: Fewest rows in a slice; the lengths of slices differ by at most one.
    """
    for mlp in mlps_of(decoder):
        vars(mlp)["forward"] = functools.partial(_in_slices, mlp.forward, min_rows)


def _in_slices(forward: Callable[[torch.Tensor], Any], min_rows: int, hidden_states: torch.Tensor) -> Any:
    rows = hidden_states.shape[:-1].numel()
    n_slices = min(MAX_SLICES, rows // min_rows)
    if n_slices < 2:
        return forward(hidden_states)
    flat = hidden_states.reshape(1, rows, -1)
    slices = flat.tensor_split(n_slices, dim=1)
    first = forward(slices[0])
    if not isinstance(first, torch.Tensor) or first.shape != slices[0].shape:
        return forward(hidden_states)
    whole = torch.empty_like(flat)
    outputs = whole.tensor_split(len(slices), dim=1)
    outputs[0].copy_(first)
    del first
    for part, output in zip(slices[1:], outputs[1:], strict=True):
        output.copy_(forward(part))
    return whole.view_as(hidden_states)
