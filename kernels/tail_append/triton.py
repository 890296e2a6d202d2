"""The append in Triton: keys, values and queries in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.tail_append.queries import Queries


def tail_append(
    tail_keys: Tensor, tail_values: Tensor, keys: Tensor, values: Tensor, index: Tensor, queries: Queries | None = None
) -> None:
    """See :func:`kvzip_press.kernels.tail_append.tail_append`; for supported inputs only."""
    batch_size, num_heads, _, head_dim = keys.shape
    value_head_dim = values.shape[3]
    if batch_size * num_heads == 0:
        return
    # Where none are kept, keys stand in, which are not read.
    window, new, shift = queries or Queries(tail_keys, keys, index)
    groups = new.shape[1] // num_heads
    with torch.cuda.device_of(keys):
        _append_kernel[(batch_size * num_heads,)](
            tail_keys,
            tail_values,
            keys,
            values,
            index,
            window,
            new,
            shift,
            *tail_keys.stride()[:3],
            *tail_values.stride()[:3],
            *keys.stride()[:2],
            *values.stride()[:2],
            *window.stride()[:3],
            *new.stride()[:2],
            window.shape[2],
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            VALUE_HEAD_DIM=value_head_dim,
            BLOCK_D=triton.next_power_of_2(max(1, head_dim, value_head_dim)),
            GROUPS=0 if queries is None else groups,
            BLOCK_G=triton.next_power_of_2(groups),
            num_warps=1,
        )


@triton.jit
def _append_kernel(
    tail_k_ptr,
    tail_v_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    window_ptr,
    q_ptr,
    shift_ptr,
    stride_tkb,
    stride_tkh,
    stride_tkt,
    stride_tvb,
    stride_tvh,
    stride_tvt,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_wb,
    stride_wh,
    stride_wt,
    stride_qb,
    stride_qh,
    room,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Appends for one row and head."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    index = tl.load(index_ptr)
    offs_d = tl.arange(0, BLOCK_D)
    keys = tl.load(k_ptr + batch * stride_kb + head * stride_kh + offs_d, offs_d < HEAD_DIM)
    values = tl.load(v_ptr + batch * stride_vb + head * stride_vh + offs_d, offs_d < VALUE_HEAD_DIM)
    row_k = tail_k_ptr + batch * stride_tkb + head * stride_tkh + index * stride_tkt
    row_v = tail_v_ptr + batch * stride_tvb + head * stride_tvh + index * stride_tvt
    tl.store(row_k + offs_d, keys, offs_d < HEAD_DIM)
    tl.store(row_v + offs_d, values, offs_d < VALUE_HEAD_DIM)
    if GROUPS > 0:
        heads = head * GROUPS + tl.arange(0, BLOCK_G)
        mask = (tl.arange(0, BLOCK_G) < GROUPS)[:, None] & (offs_d < HEAD_DIM)[None, :]
        queries = tl.load(q_ptr + batch * stride_qb + heads[:, None] * stride_qh + offs_d[None, :], mask)
        place = (index + tl.load(shift_ptr)) % room
        rows = window_ptr + batch * stride_wb + heads * stride_wh + place * stride_wt
        tl.store(rows[:, None] + offs_d[None, :], queries, mask)
