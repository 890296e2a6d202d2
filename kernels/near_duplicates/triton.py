"""Near-duplicates in Triton: a program holds a block of keys and compares it with all keys of its head, newest first.

A cosine is above the threshold if the product is above ``threshold * norm_i * norm_j``, so products stay as the tensor
cores give them: exact, but for the rounding of fp32 sums. The norm of what is not a key is NaN, which no product is
above: so neither its numbers nor any mask are needed. A program ends early if each of its keys has found another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.near_duplicates.tuning import Config, config_for
from kvzip_press.kernels.triton_ops import dot, padded

LEAST_NORM = 1e-12  # as in torch.nn.functional.normalize


def near_duplicates(keys: Tensor, valid: Tensor, threshold: float, *, config: Config | None = None) -> Tensor:
    """See :func:`kvzip_press.kernels.near_duplicates.near_duplicates`; for supported inputs only."""
    batch_size, heads, n, head_dim = keys.shape
    newest = torch.empty(valid.shape, dtype=torch.int64, device=keys.device)
    if newest.numel() == 0:
        return newest
    config = config or config_for(head_dim, keys.element_size())
    norms = torch.linalg.vector_norm(keys.detach(), dim=-1, dtype=torch.float32).clamp_(min=LEAST_NORM)
    norms = norms.masked_fill_(~valid, torch.nan).contiguous()
    with torch.cuda.device_of(keys):
        _newest_kernel[(triton.cdiv(n, config.block_i) * batch_size * heads,)](
            keys,
            norms,
            newest,
            *keys.stride()[:3],
            n,
            heads,
            threshold,
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            BLOCK_I=config.block_i,
            BLOCK_J=config.block_j,
            SPAN=config.span,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return newest


@triton.jit
def _load_keys(k_ptr, stride_kn, offs_n, n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads keys [len(offs_n), BLOCK_D], 0 beyond HEAD_DIM and n."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < n)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(k_ptr + (offs_n.to(tl.int64) * stride_kn)[:, None] + offs_d[None, :], mask, other=0.0)


@triton.jit(do_not_specialize=["n"])
def _newest_kernel(
    k_ptr,
    norms_ptr,
    newest_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    n,
    heads,
    threshold,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Finds the newest key like each of a block of keys; programs of a head, which read the same, are neighbours."""
    n_blocks = tl.cdiv(n, BLOCK_I)
    pair, first = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks * BLOCK_I
    k_ptr += (pair // heads).to(tl.int64) * stride_kb + (pair % heads).to(tl.int64) * stride_kh
    norms_ptr += pair.to(tl.int64) * n
    newest_ptr += pair.to(tl.int64) * n
    offs_i = first + tl.arange(0, BLOCK_I)
    keys = _load_keys(k_ptr, stride_kn, offs_i, n, HEAD_DIM, BLOCK_D)
    limits = threshold * tl.load(norms_ptr + offs_i, offs_i < n, other=float("nan"))
    newest = tl.where(limits == limits, -1, n)  # noqa: PLR0124  # NaN: not a key, which looks for none
    n_left = tl.cdiv(n, BLOCK_J)  # tiles
    while (n_left > 0) & (tl.min(newest, 0) < 0):
        n_tiles = tl.minimum(n_left, SPAN)
        for tile in tl.range(0, n_tiles, num_stages=STAGES):
            offs_j = (n_left - 1 - tile) * BLOCK_J + tl.arange(0, BLOCK_J)
            others = _load_keys(k_ptr, stride_kn, offs_j, n, HEAD_DIM, BLOCK_D)
            norms_j = tl.load(norms_ptr + offs_j, offs_j < n, other=float("nan"))
            is_like = dot(keys, tl.trans(others), "ieee") > limits[:, None] * norms_j[None, :]
            is_like = is_like & (offs_j[None, :] != offs_i[:, None])
            found = tl.where(is_like, offs_j[None, :], -1)
            newest = tl.maximum(newest, tl.max(found, 1))
        n_left -= n_tiles
    tl.store(newest_ptr + offs_i, tl.where(newest < n, newest, -1).to(tl.int64), offs_i < n)
