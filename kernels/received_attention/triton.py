"""Received attention in Triton: two passes over tiles of rows by keys, none of which is ever written to memory.

The rows of a key-value head are those of all query heads of its group, one head after another, so that few queries of
several heads fill a tile. The first pass gives the log-sum-exp of every row; the second holds a block of keys, streams
the rows past it, and adds up exp(logit - lse). Logits and log-sum-exps are in base 2, because the hardware computes
exp2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.received_attention.tuning import column_config, row_config
from kvzip_press.kernels.triton_ops import base2_logits, dot, logit_factors, padded


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
    """See :func:`kvzip_press.kernels.received_attention.received_attention`; for supported inputs only."""
    batch_size, num_heads, n_rows, head_dim = query.shape
    num_kv_heads, n = keys.shape[1:3]
    groups = num_heads // num_kv_heads
    sums = torch.zeros(seen_from.shape, dtype=torch.float32, device=query.device)
    if sums.numel() == 0 or n_rows == 0:
        return sums
    lse = torch.empty(batch_size, num_heads, n_rows, dtype=torch.float32, device=query.device)
    inputs = query, keys, query_positions.contiguous(), seen_from.contiguous()
    shape = *query.stride()[:3], *keys.stride()[:3], n_rows, n, num_kv_heads, groups, *logit_factors(scaling, softcap)
    common = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
    common["HAS_SOFTCAP"] = softcap is not None
    pairs = batch_size * num_kv_heads
    by_row, by_column = (
        choose(groups * n_rows, head_dim, query.element_size()) for choose in (row_config, column_config)
    )
    with torch.cuda.device_of(query):
        _row_lse_kernel[(triton.cdiv(groups * n_rows, by_row.block_m) * pairs,)](
            *inputs,
            lse,
            *shape,
            **common,
            BLOCK_M=by_row.block_m,
            BLOCK_N=by_row.block_n,
            STAGES=by_row.num_stages,
            num_warps=by_row.num_warps,
            num_stages=by_row.num_stages,
        )
        _column_sum_kernel[(triton.cdiv(n, by_column.block_n) * pairs,)](
            *inputs,
            lse,
            sums,
            *shape,
            **common,
            BLOCK_M=by_column.block_m,
            BLOCK_N=by_column.block_n,
            SQUARED=squared,
            STAGES=by_column.num_stages,
            num_warps=by_column.num_warps,
            num_stages=by_column.num_stages,
        )
    return sums


@triton.jit
def _load_rows(
    q_ptr,
    query_positions_ptr,
    offs_m,
    batch,
    kv_head,
    groups,
    n_rows,
    stride_qb,
    stride_qh,
    stride_qm,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loads rows of a key-value head, 0 beyond them, and their positions, -1 beyond them."""
    mask_m = offs_m < groups * n_rows
    head, row = (kv_head * groups + offs_m // n_rows).to(tl.int64), (offs_m % n_rows).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = (q_ptr + batch * stride_qb + head * stride_qh + row * stride_qm)[:, None] + offs_d[None, :]
    query = tl.load(ptrs, mask_m[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    return query, tl.load(query_positions_ptr + batch * n_rows + row, mask_m, other=-1)


@triton.jit
def _load_keys(k_ptr, seen_from_ptr, pair, offs_n, n, stride_kn, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads keys, 0 beyond them, and from where they are seen: from nowhere beyond them."""
    offs_d, mask_n = tl.arange(0, BLOCK_D), offs_n < n
    ptrs = k_ptr + (offs_n.to(tl.int64) * stride_kn)[:, None] + offs_d[None, :]
    keys = tl.load(ptrs, mask_n[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    return keys, tl.load(seen_from_ptr + pair.to(tl.int64) * n + offs_n, mask_n, other=0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["n_rows", "n"])
def _row_lse_kernel(
    q_ptr,
    k_ptr,
    query_positions_ptr,
    seen_from_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    n_rows,
    n,
    num_kv_heads,
    groups,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes the log-sum-exps (base 2) of a block of rows of one key-value head; -inf of a row that sees nothing."""
    n_blocks = tl.cdiv(groups * n_rows, BLOCK_M)
    pair = tl.program_id(0) // n_blocks
    batch, kv_head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    offs_m = tl.program_id(0) % n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    # fmt: off
    query, positions = _load_rows(
        q_ptr, query_positions_ptr, offs_m, batch, kv_head, groups, n_rows, stride_qb, stride_qh, stride_qm,
        HEAD_DIM, BLOCK_D,
    )
    # fmt: on
    k_ptr += batch * stride_kb + kv_head * stride_kh
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        offs_n = first + tl.arange(0, BLOCK_N)
        keys, seen_from = _load_keys(k_ptr, seen_from_ptr, pair, offs_n, n, stride_kn, HEAD_DIM, BLOCK_D)
        logits = base2_logits(dot(query, tl.trans(keys), "ieee"), factor, softcap, HAS_SOFTCAP)
        logits = tl.where(seen_from[None, :] <= positions[:, None], logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # -inf - -inf would be NaN
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        peak = new_peak
    lse_ptr += pair.to(tl.int64) * groups * n_rows
    lse = peak + tl.log2(tl.where(peak == -float("inf"), 1.0, total))
    tl.store(lse_ptr + offs_m, lse, offs_m < groups * n_rows)


@triton.jit(do_not_specialize=["n_rows", "n"])
def _column_sum_kernel(
    q_ptr,
    k_ptr,
    query_positions_ptr,
    seen_from_ptr,
    lse_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    n_rows,
    n,
    num_kv_heads,
    groups,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SQUARED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds up what all rows of a key-value head pay to each key of a block."""
    n_blocks = tl.cdiv(n, BLOCK_N)
    pair = tl.program_id(0) // n_blocks
    batch, kv_head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    offs_n = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    keys, seen_from = _load_keys(k_ptr, seen_from_ptr, pair, offs_n, n, stride_kn, HEAD_DIM, BLOCK_D)
    lse_ptr += pair.to(tl.int64) * groups * n_rows
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(0, groups * n_rows, BLOCK_M, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M)
        # fmt: off
        query, positions = _load_rows(
            q_ptr, query_positions_ptr, offs_m, batch, kv_head, groups, n_rows, stride_qb, stride_qh, stride_qm,
            HEAD_DIM, BLOCK_D,
        )
        # fmt: on
        lse = tl.load(lse_ptr + offs_m, offs_m < groups * n_rows, other=0.0)
        logits = base2_logits(dot(keys, tl.trans(query), "ieee"), factor, softcap, HAS_SOFTCAP)
        shares = tl.where(seen_from[:, None] <= positions[None, :], tl.exp2(logits - lse[None, :]), 0.0)
        if SQUARED:
            shares = shares * shares
        total += tl.sum(shares, 1)
    tl.store(out_ptr + pair.to(tl.int64) * n + offs_n, total, offs_n < n)
