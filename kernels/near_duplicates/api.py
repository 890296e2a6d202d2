"""Checks and dispatch of :func:`near_duplicates`."""

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_device, check_dtype, check_floating, check_rank, check_shape
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.near_duplicates import reference
from kvzip_press.kernels.triton_support import reason_against_heads

_IMPLS = {
    "triton": Impl(deferred("kvzip_press.kernels.near_duplicates.triton", "near_duplicates"), reason_against_heads),
    "reference": Impl(reference.near_duplicates),
}


def near_duplicates(keys: Tensor, valid: Tensor, threshold: float, *, impl: str | None = None) -> Tensor:
    """Finds for each key the newest other key of its head whose cosine with it is above a threshold.

    Of two keys the one with the higher index is newer. What is found for a key may be newer or older than it. R-KV
    (arXiv 2505.24133) spares it.

    Cosines are fp32 (fp64 for fp64 keys). A key whose norm is below 1e-12 is divided by 1e-12 instead, so a key of
    zeros has a cosine of 0 with every key. Keys that are not valid take no part, and may hold anything, NaN too. A
    valid key with a NaN is like no other.

    Args:
        keys: [batch, num_key_value_heads, n, head_dim], n >= 0, any floating dtype.
        valid: bool [batch, num_key_value_heads, n], which columns are keys.
        threshold: the cosine that has to be exceeded.
        impl: "triton" (CUDA devices, or a CPU with ``TRITON_INTERPRET=1``; fp16, bf16 and fp32, head_dim up to 256,
            last dimension contiguous; products of fp16 and bf16 numbers are exact, and nothing of n x n is in memory),
            "reference" (plain PyTorch, 64 MB of cosines at a time) or None: the first that can do this input. Sums of
            the two may differ in their last bits, so a cosine that as good as equals the threshold may be above it in
            one of them.

    Returns:
        int64 [batch, num_key_value_heads, n], contiguous: the index of that other key, or -1 where there is none and
        where ``valid`` is False.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above, or ``impl`` cannot do this input.
        TypeError: a dtype is not as above.
    """
    check_rank("keys", keys, "batch, num_key_value_heads, n, head_dim")
    check_floating("keys", keys)
    check_shape("valid", valid, keys.shape[:3], "batch, num_key_value_heads, n")
    check_dtype("valid", valid, torch.bool)
    check_device("valid", valid, keys.device)
    newest: Tensor = select("near_duplicates", _IMPLS, impl, keys)(keys, valid, threshold)
    return newest
