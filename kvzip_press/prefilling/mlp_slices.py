"""Runs MLPs slice by slice: their activations take the most memory in a forward of a few thousand tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

MAX_SLICES = 3  # with this many, the hidden states around an MLP take as much memory as its activations
MIN_ROWS = 1024  # fewer would leave a large GPU idle


@contextmanager
def mlps_in_slices(decoder: nn.Module, min_rows: int = MIN_ROWS) -> Iterator[None]:
    """While open, the ``mlp`` of each decoder layer computes its tokens in up to `MAX_SLICES` slices, one by one.

    A gated MLP holds three tensors ``[rows, intermediate_size]`` at once. It treats each token separately, so the
    result is the same up to rounding, which depends on the shapes of matrices. An ``mlp`` that returns anything other
    than a tensor of its input's shape (with router logits, say) runs unsliced. For forwards without gradients.

    Args:
        decoder: The module with the ``layers``.
        min_rows: Fewest rows in a slice; the lengths of slices differ by at most one.
    """
    layers: Any = decoder.layers
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(mlp := getattr(layer, "mlp", None), nn.Module):
                stack.enter_context(_forward_replaced(mlp, min_rows))
        yield


@contextmanager
def _forward_replaced(mlp: nn.Module, min_rows: int) -> Iterator[None]:
    """While open, the MLP runs in slices.

    The instance's own ``forward`` hides the class's, or one that was set on the instance before (accelerate does that).
    """
    original, covered = mlp.forward, vars(mlp).get("forward")
    vars(mlp)["forward"] = lambda hidden_states: _in_slices(original, hidden_states, min_rows)
    try:
        yield
    finally:
        if covered is None:
            del vars(mlp)["forward"]
        else:
            vars(mlp)["forward"] = covered


def _in_slices(forward: Callable[[torch.Tensor], Any], hidden_states: torch.Tensor, min_rows: int) -> Any:
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
