"""Decides, without importing Triton, which inputs the Triton implementations of encoding and decoding can do."""

import torch
from torch import Tensor

from kvzip_press.kernels.row_codec.codes import Codes
from kvzip_press.kernels.triton_support import reason_against_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 1024  # numbers of a row, padded, that fit the registers of a program beside others
ROTATED = range(16, 257)  # widths that a matrix product can rotate


def reason_against_encoding(rows: Tensor, codec: str, rotated: bool, centres: Tensor | None) -> str | None:  # noqa: ARG001  # as dispatch asks
    """Returns why the Triton kernel cannot encode ``rows``, or None if it can."""
    reason = reason_against_triton(rows.device) or _reason_against(rows.dtype, rows.shape[-1])
    if reason is not None:
        return reason
    if rows.numel() and rows.stride(-1) != 1 and rows.shape[-1] > 1:
        return "the numbers of a row do not lie side by side in memory (the stride of the last dimension is not 1)"
    if rotated and rows.shape[-1] not in ROTATED:
        return f"head_dim is {rows.shape[-1]}: the kernel rotates rows of {ROTATED[0]} to {ROTATED[-1]} numbers"
    return None


def reason_against_decoding(codes: Codes, dtype: torch.dtype) -> str | None:
    """Returns why the Triton kernel cannot decode ``codes`` to ``dtype``, or None if it can."""
    return reason_against_triton(codes.device) or _reason_against(dtype, codes.head_dim)


def _reason_against(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in DTYPES:
        return f"the dtype is {dtype}: the kernel does float32, float16 and bfloat16"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}: the kernel does 1 to {MAX_HEAD_DIM}"
    return None
