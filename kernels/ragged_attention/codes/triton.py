"""Ragged attention to codes in Triton: bytes become operands of the tensor cores, and no row is ever decoded.

Work is shared out and merged as for rows of the model's dtype (``split.py``), in one launch over all forms in which the
pairs of a segment are stored: a list of exact rows, which the tail belongs to, and one or two lists of codes. Each is
cut into pieces, and a program does its piece as what it is (``triton_rows.py``, ``triton_loop.py``). DESIGN.md of
kernels gives the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.ragged_attention import split
from kvzip_press.kernels.ragged_attention.codes.triton_loop import attend_codes
from kvzip_press.kernels.ragged_attention.codes.tuning import choose, rows_of_tile
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.ragged_attention.split import gdc_launch_dependents, gdc_wait, piece_of, tail_length_of
from kvzip_press.kernels.ragged_attention.triton_rows import attend_rows
from kvzip_press.kernels.ragged_attention.tuning import Config
from kvzip_press.kernels.row_codec import CODECS, Codes
from kvzip_press.kernels.triton_ops import HAS_NARROW_DOT, logit_factors, padded

COLUMNS = 8 if HAS_NARROW_DOT else 16


def ragged_attention(
    inputs: RaggedInputs, *, scaling: float, softcap: float | None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; for supported inputs only.

    ``config`` is for tuning; by default it is chosen from the shape.
    """
    return parted_attention([inputs], scaling=scaling, softcap=softcap, config=config)


def parted_attention(
    parts: Sequence[RaggedInputs], *, scaling: float, softcap: float | None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.ragged_attention.parted.parted_attention`; for supported parts only.

    The first has the tail of all.
    """
    first, coded = parts[0], [part for part in parts if isinstance(part.keys, Codes)]
    rows = first if isinstance(first.keys, Tensor) else None
    query, n_heads = first.query, first.num_key_value_heads
    batch_size, num_attention_heads, query_length, head_dim = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    groups, n_segments = num_attention_heads // n_heads, batch_size * n_heads
    n_rows = groups * query_length
    bits = max(sum(CODECS[codes.codec].bits for codes in part.codes) for part in coded)
    in_groups = any(part.codes[0].groups is not None for part in coded)
    n_coded = sum(part.n_pairs for part in coded)
    config = config or choose(n_rows, head_dim, bits, n_coded, n_segments, COLUMNS, in_groups=in_groups)
    n_row_blocks = triton.cdiv(n_rows, config.block_m)
    has_tail = first.tail_length > 0
    tail_alone = rows is None and has_tail
    n_lists = n_segments * (len(parts) + tail_alone)
    n_programs = split.n_programs(parts, n_lists, config.programs_per_sm, n_row_blocks)
    partial_out = torch.empty(n_programs, n_rows, head_dim, dtype=torch.float32, device=query.device)
    partial_sums = torch.empty(n_programs, n_rows, 2, dtype=torch.float32, device=query.device)
    lists = split.Lists([split.segments_of(part) for part in parts], n_segments, split.tail_of(first), tail_alone)
    tail_keys, tail_values, tail_length = lists.tail
    mask = first.tail_mask if has_tail else None
    exact = (query, query) if rows is None else tuple(packed.contiguous() for packed in rows.dense)
    shape = lists.shape(head_dim, query.device, has_tail=has_tail)
    of_a = _CodesOf.of(coded[0])
    of_b = of_a if len(coded) == 1 else _CodesOf.of(coded[1])
    with split.on_device(query.device):
        _attend_parts_kernel[(n_programs, n_row_blocks)](
            query,
            *exact,
            *of_a.arguments,
            *of_b.arguments,
            *lists.arguments,
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
            HAS_ROWS=rows is not None or has_tail,
            **of_a.form("A"),
            **of_b.form("B"),
            BLOCK_D=padded(head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=rows_of_tile(head_dim * query.element_size()),
            SINGLE_TOKEN=query_length == 1,
            HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap is not None,
            DOT=tl.float32 if query.dtype == torch.float32 else tl.float16,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shape,
        )
        split.merge(partial_out, partial_sums, lists, out, lse, shape)
    return out, lse


@dataclass(frozen=True)
class _CodesOf:
    """A part of codes, as the kernel takes it."""

    query: Tensor
    bias: Tensor | None
    keys: Codes
    values: Codes

    @classmethod
    def of(cls, part: RaggedInputs) -> _CodesOf:
        bias = None if part.context_bias is None else part.context_bias.contiguous()
        return cls(part.query_of_context, bias, *part.codes)

    @property
    def arguments(self) -> tuple[Any, ...]:
        groups = self.query if self.keys.groups is None else self.keys.groups.contiguous()
        key_codes, key_scales = _words(self.keys)
        bias = self.query if self.bias is None else self.bias
        return self.query, bias, key_codes, key_scales, groups, *_words(self.values), *self.query.stride()[:3]

    def form(self, name: str) -> dict[str, Any]:
        """Returns what the kernel is compiled for, of part A or B."""
        form: dict[str, Any] = {"BIASED": self.bias is not None, "GROUPED": self.keys.groups is not None}
        for which, codes in (("K", self.keys), ("V", self.values)):
            form[f"{which}_BITS"] = CODECS[codes.codec].bits
            form[f"{which}_FLOAT"] = codes.codec == "fp8"
            form[f"{which}_BLOCK"] = _block_of_words(codes)
        return {f"{name}_{key}": value for key, value in form.items()}


def _words(codes: Codes) -> tuple[Tensor, Tensor]:
    """Returns codes as words of 16 bits, and what a row (or a group's channel) needs beside them as one word each.

    That is a scale, or a scale and a zero.
    """
    scales = codes.scales.contiguous()
    has_zero = CODECS[codes.codec].has_zero
    return codes.codes.contiguous().view(torch.int16), scales.view(torch.int32 if has_zero else torch.int16)


def _block_of_words(codes: Codes) -> int:
    """Words of a row, padded to what a dot takes."""
    return max(16, triton.next_power_of_2(codes.head_dim * CODECS[codes.codec].bits // 16))


@triton.jit(do_not_specialize=["tail_length", "n_segments", "query_length"])
def _attend_parts_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    a_q_ptr,
    a_bias_ptr,
    a_k_ptr,
    a_k_meta_ptr,
    a_k_group_ptr,
    a_v_ptr,
    a_v_meta_ptr,
    stride_aqb,
    stride_aqh,
    stride_aqt,
    b_q_ptr,
    b_bias_ptr,
    b_k_ptr,
    b_k_meta_ptr,
    b_k_group_ptr,
    b_v_ptr,
    b_v_meta_ptr,
    stride_bqb,
    stride_bqh,
    stride_bqt,
    begins_0,
    starts_0,
    begins_1,
    starts_1,
    begins_2,
    starts_2,
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
    HAS_ROWS: tl.constexpr,
    A_BIASED: tl.constexpr,
    A_GROUPED: tl.constexpr,
    A_K_BITS: tl.constexpr,
    A_K_FLOAT: tl.constexpr,
    A_K_BLOCK: tl.constexpr,
    A_V_BITS: tl.constexpr,
    A_V_FLOAT: tl.constexpr,
    A_V_BLOCK: tl.constexpr,
    B_BIASED: tl.constexpr,
    B_GROUPED: tl.constexpr,
    B_K_BITS: tl.constexpr,
    B_K_FLOAT: tl.constexpr,
    B_K_BLOCK: tl.constexpr,
    B_V_BITS: tl.constexpr,
    B_V_FLOAT: tl.constexpr,
    B_V_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LISTS: tl.constexpr,
    TAIL_ALONE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    TAIL_ON_DEVICE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Finds this program's piece of pairs and computes attention to it as to what it is.

    A segment's lists are exact rows with the tail behind them (if ``HAS_ROWS``), codes A and, if there is one list
    more, codes B.
    """
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    n_tail = tail_length_of(tail_length, HAS_TAIL, TAIL_ON_DEVICE)
    found, begin, length, low, high, n_pieces = piece_of(
        program,
        begins_0,
        starts_0,
        begins_1,
        starts_1,
        begins_2,
        starts_2,
        n_tail,
        n_segments,
        LISTS,
        TAIL_ALONE,
        BLOCK_S,
    )
    if n_pieces == 0:
        return
    segment, number = found // LISTS, found % LISTS
    A: tl.constexpr = 1 if HAS_ROWS else 0
    if HAS_ROWS:
        if number == 0:
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
                starts_0,  # never read: there is no index
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
                max(BLOCK_M, 16),
                BLOCK_R,
                2,
                SINGLE_TOKEN,
                HAS_TAIL,
                False,
                False,
                HAS_MASK,
                HAS_SOFTCAP,
                PRECISION,
            )
    if number == A:
        attend_codes(
            program,
            segment,
            begin,
            low,
            high,
            a_q_ptr,
            a_bias_ptr,
            a_k_ptr,
            a_k_meta_ptr,
            a_k_group_ptr,
            a_v_ptr,
            a_v_meta_ptr,
            partial_out_ptr,
            partial_sums_ptr,
            stride_aqb,
            stride_aqh,
            stride_aqt,
            query_length,
            logit_scale,
            softcap,
            HEADS,
            GROUPS,
            HEAD_DIM,
            A_K_BITS,
            A_K_FLOAT,
            A_GROUPED,
            A_K_BLOCK,
            A_V_BITS,
            A_V_FLOAT,
            A_V_BLOCK,
            BLOCK_M,
            BLOCK_N,
            SINGLE_TOKEN,
            A_BIASED,
            HAS_SOFTCAP,
            DOT,
            PRECISION,
        )
    if LISTS > A + 1:
        if number == A + 1:
            attend_codes(
                program,
                segment,
                begin,
                low,
                high,
                b_q_ptr,
                b_bias_ptr,
                b_k_ptr,
                b_k_meta_ptr,
                b_k_group_ptr,
                b_v_ptr,
                b_v_meta_ptr,
                partial_out_ptr,
                partial_sums_ptr,
                stride_bqb,
                stride_bqh,
                stride_bqt,
                query_length,
                logit_scale,
                softcap,
                HEADS,
                GROUPS,
                HEAD_DIM,
                B_K_BITS,
                B_K_FLOAT,
                B_GROUPED,
                B_K_BLOCK,
                B_V_BITS,
                B_V_FLOAT,
                B_V_BLOCK,
                BLOCK_M,
                BLOCK_N,
                SINGLE_TOKEN,
                B_BIASED,
                HAS_SOFTCAP,
                DOT,
                PRECISION,
            )
