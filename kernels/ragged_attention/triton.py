"""Ragged attention in Triton: every program streams about the same number of pairs, whatever the heads' lengths.

Every segment (its context, then its tail) is cut into pieces of about the same length, one for each program that the
GPU can hold. A program finds its piece from ``cu_seqlens`` and the length of the tail, both read on the device: no list
of work is made or kept, and a captured graph stays valid while the tail grows. Each program writes a partial result. A
second, small kernel merges those of a segment, in parallel over query rows and slices of head_dim. On Hopper it is
launched early (programmatic dependent launch) and waits on the device. DESIGN.md of kernels gives the reasons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.ragged_attention import split
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.split import gdc_launch_dependents, gdc_wait, piece_of, tail_length_of
from kvzip_press.kernels.ragged_attention.triton_rows import attend_rows
from kvzip_press.kernels.ragged_attention.tuning import Config, choose
from kvzip_press.kernels.triton_ops import logit_factors, padded

MAX_OFFSET = 2**31  # numbers of a storage up to which a listed pair's offset is one of 32 bits


def ragged_attention(
    inputs: RaggedInputs, *, scaling: float, softcap: float | None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only.

    ``config`` is for tuning; by default it is chosen from the shape.
    """
    query, n_heads = inputs.query, inputs.num_key_value_heads
    batch_size, num_attention_heads, query_length, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    groups, n_segments = num_attention_heads // n_heads, batch_size * n_heads
    n_rows = groups * query_length
    config = config or choose(n_rows, head_dim, query.element_size(), inputs.n_pairs, n_segments)
    n_row_blocks = triton.cdiv(n_rows, config.block_m)
    n_programs = split.n_programs([inputs], n_segments, config.programs_per_sm, n_row_blocks)
    partial_out = torch.empty(n_programs, n_rows, head_dim, dtype=torch.float32, device=query.device)
    partial_sums = torch.empty(n_programs, n_rows, 2, dtype=torch.float32, device=query.device)
    begins, starts = split.segments_of(inputs)
    lists = split.Lists([(begins, starts)], n_segments, split.tail_of(inputs))
    tail_keys, tail_values, tail_length = lists.tail
    mask = inputs.tail_mask if inputs.tail_length > 0 else None
    shape = lists.shape(head_dim, query.device, has_tail=inputs.tail_length > 0)
    # A listed row waits for its place in the list: half of the stages are those of the list.
    n_stages = config.num_stages * (1 if inputs.pair_index is None else 2)
    with split.on_device(query.device):
        _attend_kernel[(n_programs, n_row_blocks)](
            query,
            *(packed.contiguous() for packed in inputs.dense),
            begins,
            starts,
            starts if inputs.pair_index is None else inputs.pair_index,
            tail_keys,
            tail_values,
            tail_length,
            query if mask is None else mask,
            partial_out,
            partial_sums,
            *query.stride()[:3],
            *tail_keys.stride()[:2],
            *tail_values.stride()[:2],
            *((0, 0, 0, 0) if mask is None else split.broadcast_strides(mask)),
            n_segments,
            query_length,
            *logit_factors(scaling, softcap),
            HEADS=n_heads,
            GROUPS=groups,
            BLOCK_D=padded(head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            STAGES=n_stages,
            SINGLE_TOKEN=query_length == 1,
            HAS_INDEX=inputs.pair_index is not None,
            WIDE_INDEX=inputs.keys.shape[0] * head_dim > MAX_OFFSET,
            HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps,
            num_stages=n_stages,
            **shape,
        )
        split.merge(partial_out, partial_sums, lists, out, lse, shape)
    return out, lse


@triton.jit(do_not_specialize=["tail_length", "n_segments", "query_length"])
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    begins_ptr,
    starts_ptr,
    index_ptr,
    tail_k_ptr,
    tail_v_ptr,
    tail_length,
    mask_ptr,
    partial_out_ptr,
    partial_sums_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_tkb,
    stride_tkh,
    stride_tvb,
    stride_tvh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mt,
    n_segments,
    query_length,
    logit_scale,
    softcap,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    LISTS: tl.constexpr,
    TAIL_ALONE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    TAIL_ON_DEVICE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Finds this program's piece of pairs and computes attention to it."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    n_tail = tail_length_of(tail_length, HAS_TAIL, TAIL_ON_DEVICE)
    segment, begin, length, low, high, n_pieces = piece_of(
        program,
        begins_ptr,
        starts_ptr,
        begins_ptr,
        starts_ptr,
        begins_ptr,
        starts_ptr,
        n_tail,
        n_segments,
        LISTS,
        TAIL_ALONE,
        BLOCK_S,
    )
    if n_pieces == 0:
        return
    attend_rows(
        program,
        segment,
        begin,
        length - n_tail,
        n_tail,
        low,
        high,
        q_ptr,
        k_ptr,
        v_ptr,
        index_ptr,
        tail_k_ptr,
        tail_v_ptr,
        mask_ptr,
        partial_out_ptr,
        partial_sums_ptr,
        stride_qb,
        stride_qh,
        stride_qt,
        stride_tkb,
        stride_tkh,
        stride_tvb,
        stride_tvh,
        stride_mb,
        stride_mh,
        stride_mq,
        stride_mt,
        query_length,
        logit_scale,
        softcap,
        HEADS,
        GROUPS,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        BLOCK_N,
        STAGES,
        SINGLE_TOKEN,
        HAS_TAIL,
        HAS_INDEX,
        WIDE_INDEX,
        HAS_MASK,
        HAS_SOFTCAP,
        PRECISION,
    )
