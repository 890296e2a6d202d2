"""The append in Triton: keys and values in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def tail_append(tail_keys: Tensor, tail_values: Tensor, keys: Tensor, values: Tensor, index: Tensor) -> None:
    """See :func:`kvzip_press.kernels.tail_append.tail_append`; for supported inputs only."""
    batch_size, num_heads, _, head_dim = keys.shape
    value_head_dim = values.shape[3]
    if batch_size * num_heads == 0:
        return
    with torch.cuda.device_of(keys):
        _append_kernel[(batch_size * num_heads,)](
            tail_keys,
            tail_values,
            keys,
            values,
            index,
            *tail_keys.stride()[:3],
            *tail_values.stride()[:3],
            *keys.stride()[:2],
            *values.stride()[:2],
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            VALUE_HEAD_DIM=value_head_dim,
            BLOCK_D=triton.next_power_of_2(max(1, head_dim, value_head_dim)),
            num_warps=1,
        )


@triton.jit
def _append_kernel(
    tail_k_ptr,
    tail_v_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
