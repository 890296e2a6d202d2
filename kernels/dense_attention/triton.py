"""Merges two attention results in Triton: every number is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16


def merge_pair(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.dense_attention.merge_attention`; for supported inputs only.

    The result is laid out in memory as [batch, query_length, num_attention_heads, head_dim], which a model needs next.
    """
    batch_size, num_heads, query_length, head_dim = out_a.shape
    out = out_a.new_empty(batch_size, query_length, num_heads, head_dim).transpose(1, 2)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    n_rows = lse.numel()
    if n_rows == 0 or head_dim == 0:
        return out, lse
    with torch.cuda.device_of(out_a):
        _merge_pair_kernel[(triton.cdiv(n_rows, BLOCK_ROWS),)](
            out_a,
            lse_a.contiguous(),
            out_b,
            lse_b.contiguous(),
            out,
            lse,
            *out_a.stride()[:3],
            *out_b.stride()[:3],
            *out.stride()[:3],
            n_rows,
            num_heads,
            query_length,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_ROWS=BLOCK_ROWS,
        )
    return out, lse


@triton.jit(do_not_specialize=["n_rows", "num_heads", "query_length"])
def _merge_pair_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    stride_ab,
    stride_ah,
    stride_aq,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_ob,
    stride_oh,
    stride_oq,
    n_rows,
    num_heads,
    query_length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Merges BLOCK_ROWS rows of both results."""
    offs_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = offs_r < n_rows
    mask = mask_r[:, None] & (offs_d < HEAD_DIM)[None, :]
    lse_a = tl.load(lse_a_ptr + offs_r, mask_r, other=-float("inf"))
    lse_b = tl.load(lse_b_ptr + offs_r, mask_r, other=-float("inf"))
    peak = tl.maximum(lse_a, lse_b)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    weight_a, weight_b = tl.exp(lse_a - peak), tl.exp(lse_b - peak)
    total = weight_a + weight_b
    tl.store(lse_ptr + offs_r, tl.log(total) + peak, mask_r)
    share = 1 / tl.maximum(total, 1.0)
    token = (offs_r % query_length).to(tl.int64)
    head = (offs_r // query_length % num_heads).to(tl.int64)
    batch = (offs_r // query_length // num_heads).to(tl.int64)
    rows_a = batch * stride_ab + head * stride_ah + token * stride_aq
    rows_b = batch * stride_bb + head * stride_bh + token * stride_bq
    rows_o = batch * stride_ob + head * stride_oh + token * stride_oq
    out_a = tl.load(out_a_ptr + rows_a[:, None] + offs_d[None, :], mask, other=0.0).to(tl.float32)
    out_b = tl.load(out_b_ptr + rows_b[:, None] + offs_d[None, :], mask, other=0.0).to(tl.float32)
    out = out_a * (weight_a * share)[:, None] + out_b * (weight_b * share)[:, None]
    tl.store(out_ptr + rows_o[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask)
