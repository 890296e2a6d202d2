"""A gate on the device and in the dtype of hidden states: one matrix product and one kernel score a slice of tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from kvzip_press.kernels.gate_scores import gate_scores
from kvzip_press.presses.fastkvzip.gate import LayerGate

# The product's output takes num_key_value_heads * (groups + 1) * dim numbers per token: 21 MB for a slice in bf16 on an
# 8B model, whatever the context, so it stays in a GPU's L2 cache. At 4096 tokens the product is too small for a GPU:
# 160 tiles of 128 x 128 on 132 multiprocessors leave the second round nearly empty.
TOKENS = 16384


class PlacedGate:
    """Copies of a gate's parameters, for scoring: gives the same scores as :class:`LayerGate`, up to rounding.

    Both projections are merged, so that the hidden states are read once. Norms, bias and sinks are fp32.

    Args:
        gate: The gate.
        device: The device of the hidden states.
        dtype: The dtype of the hidden states and of the projection.
    """

    def __init__(self, gate: LayerGate, device: torch.device, dtype: torch.dtype) -> None:
        _, heads, groups, dim, _ = gate.shape
        self._queries, self._keys = (heads, groups, dim), (heads, dim)
        no_bias = gate.q_proj.bias.new_zeros(gate.k_proj.out_features)
        self._weight = torch.cat([gate.q_proj.weight, gate.k_proj.weight]).to(device, dtype)
        self._bias = torch.cat([gate.q_proj.bias, no_bias]).to(device, dtype)
        rest = (gate.q_norm.weight, gate.k_norm.weight, gate.b[:, 0], gate.k_base[:, 0])
        self._rest = [tensor.to(device, torch.float32) for tensor in rest]

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns scores ``[..., num_key_value_heads, n]``, fp32 in (0, 1), of states ``[..., n, hidden_size]``."""
        slices = hidden_states.flatten(0, -2).split(TOKENS)
        scores = torch.cat([self._scores(tokens) for tokens in slices], dim=1)
        return scores.unflatten(1, hidden_states.shape[:-1]).movedim(0, -2).float().contiguous()

    def _scores(self, tokens: torch.Tensor) -> torch.Tensor:
        projected = linear(tokens, self._weight, self._bias)
        queries, keys = projected.tensor_split([torch.Size(self._queries).numel()], dim=1)
        return gate_scores(queries.unflatten(1, self._queries), keys.unflatten(1, self._keys), *self._rest)
