"""Attention to a pool of contexts by PyTorch's fused CPU kernel: a call a segment, for all its tokens."""

import torch
from torch import Tensor

from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.dense_attention.aten import reason_against_flash
from kvzip_press.kernels.dense_attention.merge import merge_many
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.ragged_attention.aten import attend_segment
from kvzip_press.kernels.row_codec import Codes


def reason_against(query: Tensor, keys: Tensor | Codes, values: Tensor | Codes, softcap: float | None) -> str | None:
    """Returns why this implementation cannot do this input, or None if it can."""
    if query.device.type != "cpu":
        return f"the device is {query.device.type}"
    if isinstance(keys, Codes) or isinstance(values, Codes):
        return "keys and values are codes"
    return "a softcap is given" if softcap is not None else reason_against_flash(query, keys, values)


def context_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: ContextPlan,
    layer_idx: int,
    *,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.context_attention.context_attention`; for supported inputs only."""
    assert softcap is None, "see reason_against"
    grouped = query.unflatten(1, (plan.num_key_value_heads, -1))
    out = torch.zeros(grouped.shape, dtype=query.dtype)
    lse = torch.full(grouped.shape[:-1], -torch.inf, dtype=accumulation_dtype(query.dtype))
    for context, tokens in plan.tokens_of_contexts():
        own = grouped[tokens]  # [tokens, kv heads, groups, head_dim]
        for head, pairs in enumerate(plan.segments(layer_idx, context)):
            rows = own[:, head].reshape(1, 1, -1, own.shape[-1])
            parts = attend_segment(rows, keys[None, None, pairs], values[None, None, pairs], scaling)
            if parts:
                outs, lses = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
                merged, own_lse = merge_many(outs, lses)
                out[tokens, head] = merged.to(out.dtype).view(own[:, head].shape)
                lse[tokens, head] = own_lse.view(own.shape[0], -1)
    return out.flatten(1, 2), lse.flatten(1, 2)
