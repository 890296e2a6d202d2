"""Exact merge of attention over disjoint sets of keys."""

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_like, check_rank, check_shape
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.triton_support import reason_against_triton


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merges the attention to two disjoint sets of keys into the attention to their union.

    Exact: each side is weighted by exp(lse), its share of the softmax denominator.

    Args:
        out_a: [batch, num_attention_heads, query_length, value_head_dim], attention to the first set.
        lse_a: [batch, num_attention_heads, query_length], its log-sum-exp; -inf where a row saw no key of the set.
        out_b: as ``out_a``, attention to the second set.
        lse_b: as ``lse_a``.
        impl: "triton" (one pass, CUDA), "reference" (plain PyTorch) or None: the first that can do this input.

    Returns:
        out in the dtype of ``out_a`` and lse in that of ``lse_a``; 0 and -inf for a row that saw no key of either set.
        Weights and sums are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes or devices differ, or the implementation named cannot do this input.
        TypeError: the dtypes differ.
    """
    dims = "batch, num_attention_heads, query_length, value_head_dim"
    check_rank("out_a", out_a, dims)
    check_shape("out_b", out_b, out_a.shape, dims)
    check_shape("lse_a", lse_a, out_a.shape[:3], "batch, num_attention_heads, query_length")
    check_shape("lse_b", lse_b, out_a.shape[:3], "batch, num_attention_heads, query_length")
    check_like("out_b", out_b, "out_a", out_a)
    check_like("lse_b", lse_b, "lse_a", lse_a)
    return merge_pair(out_a, lse_a, out_b, lse_b, impl)


def merge_pair(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`merge_attention` without its checks."""
    return select("merge_attention", _IMPLS, impl, out_a, out_b)(out_a, lse_a, out_b, lse_b)


def _reason_against_triton(out_a: Tensor, out_b: Tensor) -> str | None:
    if out_a.dtype == torch.float64:
        return "the dtype is torch.float64"
    if out_a.ndim != 4 or (out_a.numel() and not out_a.stride(-1) == out_b.stride(-1) == 1):
        return "the last dimension is not contiguous"
    return reason_against_triton(out_a.device)


def _reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    peak = lse_a.maximum(lse_b)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weight_a, weight_b = (lse_a - peak).exp_(), (lse_b - peak).exp_()
    total = weight_a + weight_b
    lse = total.log() + peak
    share = total.clamp_min_(1.0).reciprocal_()
    dtype = accumulation_dtype(out_a.dtype)
    out = out_a.to(dtype) * (weight_a * share).unsqueeze(-1) + out_b.to(dtype) * (weight_b * share).unsqueeze(-1)
    return out.to(out_a.dtype), lse


_IMPLS = {
    "triton": Impl(deferred("kvzip_press.kernels.dense_attention.triton", "merge_pair"), _reason_against_triton),
    "reference": Impl(_reference),
}


def merge_many(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`merge_attention` of any number of parts, without its checks.

    Args:
        outs: [batch, parts, rows, head_dim].
        lses: [batch, parts, rows].

    Returns:
        out [batch, rows, head_dim] in the dtype of ``lses``, and lse [batch, rows].
    """
    # For a row that sees nothing the softmax gives NaN shares; they become 0, and the clamp keeps the log finite.
    weights = lses.softmax(1).masked_fill_(lses == float("-inf"), 0.0)
    lse = lses.amax(1) - weights.amax(1).clamp_min_(torch.finfo(lses.dtype).tiny).log_()
    return (outs * weights.unsqueeze(-1)).sum(1), lse
