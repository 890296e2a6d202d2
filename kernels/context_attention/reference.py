"""Attention to a pool of contexts in plain PyTorch: a loop over contexts and heads, a block of tokens at a time."""

import torch
from torch import Tensor

from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.numerics import MAX_LOGITS, Part, accumulation_dtype, attend
from kvzip_press.kernels.row_codec import Codes, decode_rows


def context_attention(
    query: Tensor,
    keys: Tensor | Codes,
    values: Tensor | Codes,
    plan: ContextPlan,
    layer_idx: int,
    *,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.context_attention.context_attention`."""
    dtype = accumulation_dtype(query.dtype)
    grouped = query.unflatten(1, (plan.num_key_value_heads, -1))
    out = query.new_empty(*grouped.shape[:-1], values.shape[-1])
    lse = query.new_empty(grouped.shape[:-1], dtype=dtype)
    for context, tokens in plan.tokens_of_contexts():
        for head, pairs in enumerate(plan.segments(layer_idx, context)):
            part = Part(*(_decoded(one[pairs]).to(dtype) for one in (keys, values)))
            n_rows = max(1, MAX_LOGITS // max(1, plan.groups * part.keys.shape[0]))
            for start in range(0, len(tokens), n_rows):
                block = tokens[start : start + n_rows]
                rows = grouped[block, head].transpose(0, 1).to(dtype) * scaling  # [groups, tokens, head_dim]
                attended, own_lse = attend(rows, [part], softcap)
                out[block, head] = attended.transpose(0, 1).to(out.dtype)
                lse[block, head] = own_lse.transpose(0, 1)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _decoded(rows: Tensor | Codes) -> Tensor:
    return decode_rows(rows, torch.float32) if isinstance(rows, Codes) else rows
