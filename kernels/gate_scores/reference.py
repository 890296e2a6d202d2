"""The scores of a gate in plain PyTorch, a block of tokens at a time."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from kvzip_press.kernels.numerics import MAX_LOGITS, accumulation_dtype


def gate_scores(
    queries: Tensor, keys: Tensor, q_weight: Tensor, k_weight: Tensor, bias: Tensor, sinks: Tensor, *, eps: float
) -> Tensor:
    """See :func:`kvzip_press.kernels.gate_scores.gate_scores`."""
    dtype = accumulation_dtype(queries.dtype)
    _, num_heads, groups, dim = queries.shape
    parameters = [q_weight.to(dtype) * dim**-0.5, *(x.to(dtype) for x in (k_weight, bias, sinks))]
    n_tokens = max(1, MAX_LOGITS // (num_heads * groups * max(1, sinks.shape[1])))
    blocks = zip(queries.split(n_tokens), keys.split(n_tokens), strict=True)
    return torch.cat([_scores(q.to(dtype), k.to(dtype), *parameters, eps=eps) for q, k in blocks], dim=1)


def _scores(
    queries: Tensor, keys: Tensor, q_weight: Tensor, k_weight: Tensor, bias: Tensor, sinks: Tensor, *, eps: float
) -> Tensor:
    """Returns the scores of a block, all in one dtype; ``q_weight`` already includes the scaling of the logits."""
    queries = rms_norm(queries, q_weight.shape, q_weight, eps)
    keys = rms_norm(keys, k_weight.shape, k_weight, eps)
    own = (queries * keys.unsqueeze(2)).sum(-1) + bias
    others = torch.einsum("nhgd,hsd->nhgs", queries, sinks).logsumexp(-1)
    return torch.sigmoid(own - others).mean(-1).t()
