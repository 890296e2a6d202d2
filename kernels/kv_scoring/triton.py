"""KVzip's score in Triton: two passes over tiles of rows by keys, none of which is ever written to memory.

The first pass gives the log-sum-exp of every replay row over sink, chunk and visible replay keys; callers that have it
from the attention itself skip this pass. The second holds a block of chunk keys and streams the query rows past it. A
key's probability is exp(logit - lse), and exp is monotone: without weights the largest exponent is kept, and exp is
taken once, at the end. Logits and log-sum-exps are in base 2 inside the kernels, because the hardware computes exp2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.kv_scoring.tuning import Config, column_config, n_column_splits, row_config
from kvzip_press.kernels.triton_ops import LOG2_E, base2_logits, dot, logit_factors, padded


def kv_scoring(
    query: Tensor,
    sink_keys: Tensor,
    chunk_keys: Tensor,
    replay_keys: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    key_weight: Tensor | None,
    query_weight: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """See :func:`kvzip_press.kernels.kv_scoring.kv_scoring`; for supported inputs only."""
    if chunk_keys.numel() == 0:
        return torch.empty(chunk_keys.shape[:3], dtype=torch.float32, device=query.device)
    if lse is None:
        lse = row_lse(query, sink_keys, chunk_keys, replay_keys, scaling=scaling, softcap=softcap)
    else:
        lse = (lse * LOG2_E).contiguous()
    return column_max(
        query, chunk_keys, lse, scaling=scaling, softcap=softcap, key_weight=key_weight, query_weight=query_weight
    )


def row_lse(
    query: Tensor,
    sink_keys: Tensor,
    chunk_keys: Tensor,
    replay_keys: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    config: Config | None = None,
) -> Tensor:
    """Runs the first pass: the log-sum-exp of every row.

    Args:
        query: as in :func:`kv_scoring`.
        sink_keys: as in :func:`kv_scoring`.
        chunk_keys: as in :func:`kv_scoring`.
        replay_keys: as in :func:`kv_scoring`.
        scaling: factor of the logits.
        softcap: cap of the logits, or None.
        config: for tuning; by default chosen from the shape.

    Returns:
        fp32 [batch, num_attention_heads, n_rows], contiguous: log2 of the sum of exp(logits) over a row's keys.
    """
    batch_size, num_heads, n_rows, head_dim = query.shape
    config = config or row_config(head_dim, query.element_size())
    out = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _row_lse_kernel[(triton.cdiv(n_rows, config.block_m), batch_size * num_heads)](
            query,
            sink_keys,
            chunk_keys,
            replay_keys,
            out,
            *query.stride()[:3],
            *sink_keys.stride()[:3],
            *chunk_keys.stride()[:3],
            *replay_keys.stride()[:3],
            n_rows,
            sink_keys.shape[2],
            chunk_keys.shape[2],
            num_heads,
            num_heads // chunk_keys.shape[1],
            *logit_factors(scaling, softcap),
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            HAS_SOFTCAP=softcap is not None,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def column_max(
    query: Tensor,
    chunk_keys: Tensor,
    lse: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    key_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    config: Config | None = None,
    n_splits: int | None = None,
) -> Tensor:
    """Runs the second pass: the largest probability of every chunk key.

    Args:
        query: as in :func:`kv_scoring`.
        chunk_keys: as in :func:`kv_scoring`, at least one key.
        lse: the result of :func:`row_lse`.
        scaling: factor of the logits.
        softcap: cap of the logits, or None.
        key_weight: as in :func:`kv_scoring`.
        query_weight: as in :func:`kv_scoring`.
        config: for tuning; by default chosen from the shape.
        n_splits: for tuning: programs that share the query rows of a block of keys; by default enough to fill the GPU.

    Returns:
        Scores, fp32 [batch, num_key_value_heads, n_chunk].
    """
    batch_size, num_heads, n_rows, head_dim = query.shape
    num_kv_heads, n_chunk = chunk_keys.shape[1:3]
    config = config or column_config(head_dim, query.element_size())
    n_blocks = triton.cdiv(n_chunk, config.block_n) * batch_size * num_kv_heads
    n_steps = triton.cdiv(n_rows, config.block_m) * (num_heads // num_kv_heads)
    n_splits = n_splits or n_column_splits(n_blocks, query.device)
    n_splits = min(n_splits, n_steps)
    out = torch.empty(n_splits, *chunk_keys.shape[:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _column_max_kernel[(triton.cdiv(n_chunk, config.block_n), batch_size * num_kv_heads, n_splits)](
            query,
            chunk_keys,
            lse,
            lse if key_weight is None else key_weight,
            lse if query_weight is None else query_weight,
            out,
            *query.stride()[:3],
            *chunk_keys.stride()[:3],
            *((0, 0, 0) if key_weight is None else key_weight.stride()),
            *((0, 0) if query_weight is None else query_weight.stride()),
            n_rows,
            n_chunk,
            num_kv_heads,
            num_heads // num_kv_heads,
            *logit_factors(scaling, softcap),
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            HAS_SOFTCAP=softcap is not None,
            HAS_KEY_WEIGHT=key_weight is not None,
            HAS_QUERY_WEIGHT=query_weight is not None,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out[0] if n_splits == 1 else out.amax(0)


@triton.jit
def _load_tile(ptrs, mask_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Loads rows of BLOCK_D numbers, 0 beyond HEAD_DIM and, if MASKED, where ``mask_rows`` is False."""
    mask_d = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if MASKED:
        return tl.load(ptrs, mask_rows[:, None] & mask_d, other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask_d, other=0.0)


@triton.jit
def _add_keys(
    peak,
    total,
    query,
    k_ptr,
    stride_kn,
    start,
    stop,
    offs_m,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds keys start .. stop - 1 to each row's running sum of exp2(logits - peak); only whole tiles unless MASKED.

    Every row has seen a key by the end of the first tile, so ``peak - new_peak`` is never -inf - -inf.
    """
    k_rows = (start + tl.arange(0, BLOCK_N)).to(tl.int64) * stride_kn
    k_ptrs = k_ptr + k_rows[:, None] + tl.arange(0, BLOCK_D)[None, :]
    step = tl.full([], BLOCK_N, tl.int64) * stride_kn
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        offs_n = first + tl.arange(0, BLOCK_N)
        keys = _load_tile(k_ptrs, offs_n < stop, HEAD_DIM, BLOCK_D, MASKED)
        logits = base2_logits(dot(query, tl.trans(keys), "ieee"), factor, softcap, HAS_SOFTCAP)
        if MASKED:
            mask_n = offs_n[None, :] < stop
            if CAUSAL:
                mask_n = mask_n & (offs_n[None, :] <= offs_m[:, None])
            logits = tl.where(mask_n, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(logits - new_peak[:, None]), 1)
        peak = new_peak
        k_ptrs += step
    return peak, total


@triton.jit
def _add_region(
    peak,
    total,
    query,
    k_ptr,
    stride_kn,
    n_whole,
    n_keys,
    offs_m,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds a region of keys, see :func:`_add_keys`; those from ``n_whole`` on, a multiple of BLOCK_N, are masked."""
    # fmt: off
    peak, total = _add_keys(
        peak, total, query, k_ptr, stride_kn, 0, n_whole, offs_m, factor, softcap,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_SOFTCAP, False, CAUSAL, STAGES,
    )
    peak, total = _add_keys(
        peak, total, query, k_ptr, stride_kn, n_whole, n_keys, offs_m, factor, softcap,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_SOFTCAP, True, CAUSAL, 1,
    )
    # fmt: on
    return peak, total


@triton.jit(do_not_specialize=["n_rows", "n_sink", "n_chunk"])
def _row_lse_kernel(
    q_ptr,
    sink_ptr,
    chunk_ptr,
    replay_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_sb,
    stride_sh,
    stride_sn,
    stride_cb,
    stride_ch,
    stride_cn,
    stride_rb,
    stride_rh,
    stride_rn,
    n_rows,
    n_sink,
    n_chunk,
    num_heads,
    groups,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes log-sum-exps (base 2) of a block of query rows of one head; later rows see more keys and start first."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    pair = tl.program_id(1)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    kv_head = head // groups
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_rows
    q_rows = q_ptr + batch * stride_qb + head * stride_qh + offs_m.to(tl.int64) * stride_qm
    query = _load_tile(q_rows[:, None] + tl.arange(0, BLOCK_D)[None, :], mask_m, HEAD_DIM, BLOCK_D, True)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sink = sink_ptr + batch * stride_sb + kv_head * stride_sh
    chunk = chunk_ptr + batch * stride_cb + kv_head * stride_ch
    replay = replay_ptr + batch * stride_rb + kv_head * stride_rh
    # fmt: off
    peak, total = _add_region(
        peak, total, query, sink, stride_sn, n_sink // BLOCK_N * BLOCK_N, n_sink, offs_m, factor, softcap,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_SOFTCAP, False, STAGES,
    )
    peak, total = _add_region(
        peak, total, query, chunk, stride_cn, n_chunk // BLOCK_N * BLOCK_N, n_chunk, offs_m, factor, softcap,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_SOFTCAP, False, STAGES,
    )
    last = tl.minimum(row + BLOCK_M, n_rows)
    peak, total = _add_region(
        peak, total, query, replay, stride_rn, row // BLOCK_N * BLOCK_N, last, offs_m, factor, softcap,
        HEAD_DIM, BLOCK_D, BLOCK_N, HAS_SOFTCAP, True, STAGES,
    )
    # fmt: on
    tl.store(lse_ptr + pair.to(tl.int64) * n_rows + offs_m, peak + tl.log2(total), mask_m)


@triton.jit(do_not_specialize=["n_rows", "n_chunk"])
def _column_max_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    key_weight_ptr,
    query_weight_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_wb,
    stride_wh,
    stride_wn,
    stride_ub,
    stride_um,
    n_rows,
    n_chunk,
    num_kv_heads,
    groups,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_WEIGHT: tl.constexpr,
    HAS_QUERY_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes the largest probability of each key of a block, over a share of its group's (query head, row block)s.

    No row is masked: the last block of rows starts early enough to be whole, and a replay shorter than a block is
    filled up with copies of its last row. A row that is seen twice does not change the maximum.
    """
    pair = tl.program_id(1)
    batch, kv_head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_chunk
    k_rows = k_ptr + batch * stride_kb + kv_head * stride_kh + offs_n.to(tl.int64) * stride_kn
    keys = _load_tile(k_rows[:, None] + tl.arange(0, BLOCK_D)[None, :], mask_n, HEAD_DIM, BLOCK_D, True)
    offs_m = tl.minimum(tl.arange(0, BLOCK_M), n_rows - 1).to(tl.int64)
    q_ptrs = q_ptr + batch * stride_qb + offs_m[:, None] * stride_qm + tl.arange(0, BLOCK_D)[None, :]
    lse_ptrs = lse_ptr + batch * num_kv_heads * groups * n_rows + offs_m
    best = tl.full([BLOCK_N], -float("inf"), tl.float32)
    # A maximum skips NaN, which must not end as a small score: 0 * lse is NaN for a row whose softmax is NaN.
    poison = tl.zeros([BLOCK_M], tl.float32)
    n_row_blocks = tl.cdiv(n_rows, BLOCK_M)
    n_steps = n_row_blocks * groups
    split, n_splits = tl.program_id(2), tl.num_programs(2)
    for step in tl.range(split * n_steps // n_splits, (split + 1) * n_steps // n_splits, num_stages=STAGES):
        head = kv_head * groups + step // n_row_blocks
        row = tl.maximum(tl.minimum(step % n_row_blocks * BLOCK_M, n_rows - BLOCK_M), 0).to(tl.int64)
        query = _load_tile(q_ptrs + (head * stride_qh + row * stride_qm), mask_n, HEAD_DIM, BLOCK_D, False)
        lse = tl.load(lse_ptrs + (head * n_rows + row))
        poison += 0.0 * lse
        logits = base2_logits(dot(keys, tl.trans(query), "ieee"), factor, softcap, HAS_SOFTCAP)
        shares = logits - lse[None, :]
        if HAS_KEY_WEIGHT or HAS_QUERY_WEIGHT:
            shares = tl.exp2(shares)
        if HAS_KEY_WEIGHT:
            key_weight_ptrs = key_weight_ptr + batch * stride_wb + head * stride_wh + offs_n.to(tl.int64) * stride_wn
            key_weight = tl.load(key_weight_ptrs, mask_n, other=0.0).to(tl.float32)
            shares *= key_weight[:, None]
            best += 0.0 * key_weight
        if HAS_QUERY_WEIGHT:
            query_weight_ptrs = query_weight_ptr + batch * stride_ub + (row + offs_m) * stride_um
            query_weight = tl.load(query_weight_ptrs).to(tl.float32)
            shares *= query_weight[None, :]
            poison += 0.0 * query_weight
        best = tl.maximum(best, tl.max(shares, 1), propagate_nan=tl.PropagateNan.ALL)
    if not (HAS_KEY_WEIGHT or HAS_QUERY_WEIGHT):
        best = tl.exp2(best)
    best += tl.sum(poison, 0)
    out_row = (split * tl.num_programs(1) + pair).to(tl.int64)
    tl.store(out_ptr + out_row * n_chunk + offs_n, best, mask_n)
