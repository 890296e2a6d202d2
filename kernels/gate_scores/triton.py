"""The scores of a gate in Triton: the projections' output is read once, and nothing but the scores is written.

``e^l / (e^l + sum_j e^s_j)`` is computed as ``1 / (1 + sum_j e^(s_j - l))``, which needs no maximum: at worst the sum
is infinite, and then the score is 0, as any other formula gives in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64  # most tokens of a program
TILE = 4096  # most numbers in its queries, padded: 32 registers per thread


def gate_scores(
    queries: Tensor, keys: Tensor, q_weight: Tensor, k_weight: Tensor, bias: Tensor, sinks: Tensor, *, eps: float
) -> Tensor:
    """See :func:`kvzip_press.kernels.gate_scores.gate_scores`; for supported inputs only."""
    n_tokens, num_heads, groups, dim = queries.shape
    out = torch.empty(num_heads, n_tokens, dtype=torch.float32, device=queries.device)
    if n_tokens == 0:
        return out
    block_g, block_d = triton.next_power_of_2(groups), triton.next_power_of_2(dim)
    block_n = min(BLOCK_N, TILE // (block_g * block_d))
    with torch.cuda.device_of(queries):
        _scores_kernel[(triton.cdiv(n_tokens, block_n) * num_heads,)](
            queries,
            keys,
            q_weight.contiguous(),
            k_weight.contiguous(),
            bias.contiguous(),
            sinks.contiguous(),
            out,
            *queries.stride()[:3],
            *keys.stride()[:2],
            n_tokens,
            eps,
            dim**-0.5,
            HEADS=num_heads,
            GROUPS=groups,
            DIM=dim,
            N_SINK=sinks.shape[1],
            BLOCK_N=block_n,
            BLOCK_G=block_g,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out


@triton.jit
def _rms_norm(x, weight, eps, DIM: tl.constexpr):
    """RMS norm over the last of three dimensions; elements beyond DIM are 0."""
    return x * tl.rsqrt(tl.sum(x * x, 2, keep_dims=True) / DIM + eps) * weight


@triton.jit(do_not_specialize=["n_tokens"])
def _scores_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    bias_ptr,
    sinks_ptr,
    out_ptr,
    stride_qn,
    stride_qh,
    stride_qg,
    stride_kn,
    stride_kh,
    n_tokens,
    eps,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    N_SINK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores a block of tokens of one KV head; programs read a token's heads, which are adjacent, at the same time."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    offs_n = (tl.program_id(0) // HEADS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask_n, mask_g, mask_d = offs_n < n_tokens, offs_g < GROUPS, offs_d < DIM
    mask_k = mask_n[:, None, None] & mask_d[None, None, :]
    q_rows = (head * stride_qh + offs_n * stride_qn)[:, None] + (offs_g * stride_qg)[None, :]
    k_rows = head * stride_kh + offs_n * stride_kn
    queries = tl.load(q_ptr + q_rows[:, :, None] + offs_d, mask_k & mask_g[None, :, None], other=0.0).to(tl.float32)
    keys = tl.load(k_ptr + k_rows[:, None, None] + offs_d, mask_k, other=0.0).to(tl.float32)
    q_weight = tl.load(q_weight_ptr + offs_d, mask_d, other=0.0).to(tl.float32) * scale
    k_weight = tl.load(k_weight_ptr + offs_d, mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + head * GROUPS + offs_g, mask_g, other=0.0).to(tl.float32)
    queries = _rms_norm(queries, q_weight, eps, DIM)
    own = tl.sum(queries * _rms_norm(keys, k_weight, eps, DIM), 2) + bias
    others = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    sinks_ptr += head * N_SINK * DIM
    for j in range(N_SINK):
        sink = tl.load(sinks_ptr + j * DIM + offs_d, mask_d, other=0.0).to(tl.float32)
        others += tl.exp(tl.sum(queries * sink, 2) - own)
    scores = tl.where(mask_g, 1 / (1 + others), 0.0)
    tl.store(out_ptr + head * n_tokens + offs_n, tl.sum(scores, 1) / GROUPS, mask_n)
