"""Near-duplicates in plain PyTorch: the cosines of some heads at a time, or of some rows of one head."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvzip_press.kernels.numerics import accumulation_dtype

TILE = 2**24  # most numbers that are in memory at a time: 64 MB of cosines in fp32


def near_duplicates(keys: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """See :func:`kvzip_press.kernels.near_duplicates.near_duplicates`."""
    (n, head_dim), dtype = keys.shape[2:], accumulation_dtype(keys.dtype)
    newest = torch.full(valid.shape, -1, dtype=torch.int64, device=keys.device)
    if newest.numel() == 0:
        return newest
    by_head = zip(
        *(of_keys.flatten(0, 1).split(max(TILE // (n * max(n, head_dim)), 1)) for of_keys in (keys, valid, newest)),
        strict=True,
    )
    rows = range(0, n, max(TILE // n, 1))
    for some, are_keys, found in by_head:
        unit = normalize(some.detach().to(dtype), dim=-1)
        numbers = torch.arange(1, n + 1, dtype=dtype, device=keys.device) * are_keys  # 0 is none
        for start in rows:
            block = slice(start, start + rows.step)
            cosines = unit[:, block] @ unit.mT
            cosines.diagonal(start, 1, 2).fill_(-torch.inf)
            found[:, block] = cosines.gt_(threshold).mul_(numbers.unsqueeze(1)).amax(-1) - 1
    return newest.masked_fill_(~valid, -1)
