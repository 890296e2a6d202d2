"""Received attention in plain PyTorch: the probabilities of some query rows at a time."""

import torch
from torch import Tensor

from kvzip_press.kernels.numerics import accumulation_dtype, softcapped

MOST_LOGITS = 2**26
"""Most logits that are in memory at a time, unless one query row alone has more: 256 MB in fp32."""


def received_attention(
    query: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    seen_from: Tensor,
    *,
    squared: bool,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """See :func:`kvzip_press.kernels.received_attention.received_attention`."""
    dtype = accumulation_dtype(query.dtype)
    batch_size, num_kv_heads, n = seen_from.shape
    grouped, turned = query.unflatten(1, (num_kv_heads, -1)), keys.to(dtype).transpose(-1, -2)
    sums = torch.zeros(seen_from.shape, dtype=dtype, device=query.device)
    if sums.numel() == 0:
        return sums
    for start in range(0, query.shape[2], size := max(MOST_LOGITS // (batch_size * query.shape[1] * n), 1)):
        block = slice(start, start + size)
        unknown = (query_positions[:, block] < 0)[:, None, None, :, None]
        rows = grouped[:, :, :, block].to(dtype).masked_fill(unknown, 0)
        logits = softcapped((rows.flatten(2, 3) @ turned).mul_(scaling), softcap).unflatten(2, rows.shape[2:4])
        sees = (seen_from[:, :, None] <= query_positions[:, None, block, None]).unsqueeze(2)
        blind = ~sees.any(dim=-1, keepdim=True)  # softmax over nothing would be NaN
        shares = logits.masked_fill_(~sees & ~blind, -torch.inf).softmax(dim=-1).where(sees, 0)
        sums += (shares.square_() if squared else shares).sum(dim=(2, 3))
    return sums
