"""The gate of one attention layer (Fast KVzip, https://arxiv.org/abs/2601.17668), which predicts KVzip's scores.

For a token with hidden state x, KV head h and query head g of its group, in ``dim`` dimensions (16):

    q = RMSNorm(W_q x + c)[h, g]      k = RMSNorm(W_k x)[h]
    l = <q, k> / sqrt(dim) + b[h, g]  s_j = <q, sink_j[h]> / sqrt(dim)
    score[h] = mean over g of  e^l / (e^l + sum_j e^s_j)

A token's attention to itself competes with ``n_sink`` learned sinks: no other token and no position plays a part.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class LayerGate(nn.Module):
    """Scores of one layer's pairs from the hidden states that enter its attention.

    The names of the parameters and their shapes are those of the published checkpoints. The norms, the logits and the
    scores are fp32 whatever the dtype of the projections; the authors' code rounds the normalised vectors to that dtype
    in between. This module is used for training; ``Gates`` score with a kernel that gives the same results.

    Args:
        hidden_size: The model's hidden size.
        num_key_value_heads: KV heads of the layer.
        num_key_value_groups: Query heads that share a KV head.
        dim: Dimensions of the gate's queries and keys.
        n_sink: Learned sinks.
        dtype: Dtype of the projections and ``b``; torch's default if None.
    """

    def __init__(
        self,
        hidden_size: int,
        num_key_value_heads: int,
        num_key_value_groups: int,
        *,
        dim: int = 16,
        n_sink: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads, groups = num_key_value_heads, num_key_value_groups
        self.dim = dim
        self.q_proj = nn.Linear(hidden_size, heads * groups * dim, dtype=dtype)
        self.k_proj = nn.Linear(hidden_size, heads * dim, bias=False, dtype=dtype)
        self.q_norm = nn.RMSNorm(dim, eps=1e-6, dtype=torch.float32)
        self.k_norm = nn.RMSNorm(dim, eps=1e-6, dtype=torch.float32)
        self.b = nn.Parameter(torch.zeros(heads, 1, groups, dtype=dtype))
        self.k_base = nn.Parameter(torch.zeros(heads, 1, n_sink, dim, dtype=torch.float32))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """hidden_size, num_key_value_heads, num_key_value_groups, dim, n_sink."""
        heads, _, n_sink, dim = self.k_base.shape
        return self.q_proj.in_features, heads, self.b.shape[2], dim, n_sink

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns scores ``[..., num_key_value_heads, n]``, fp32 in (0, 1), of states ``[..., n, hidden_size]``."""
        logits, sinks = self.logits(hidden_states)
        return torch.sigmoid(logits - sinks.logsumexp(dim=-1)).mean(dim=-1).transpose(-1, -2)

    def logits(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``l`` as ``[..., n, heads, groups]`` and ``s`` as ``[..., n, heads, groups, n_sink]``, fp32."""
        heads, groups = self.b.shape[0], self.b.shape[2]
        queries = self.q_norm(self.q_proj(hidden_states).float().unflatten(-1, (heads, groups, self.dim)))
        keys = self.k_norm(self.k_proj(hidden_states).float().unflatten(-1, (heads, self.dim)))
        scale = 1 / math.sqrt(self.dim)
        own = (queries * keys.unsqueeze(-2)).sum(dim=-1) * scale + self.b[:, 0].float()
        sinks = torch.einsum("...hgd,hsd->...hgs", queries, self.k_base[:, 0].float()) * scale
        return own, sinks
