"""Encoding and decoding of rows in Triton: a row is read once, stays in registers, and its codes are written.

The codes are those of the reference, bit for bit: what it rounds, and in which order, is the same here. Hence division
is the exact one, no product is fused with a sum, and rounding to whole numbers, to bf16 and to e4m3 is done on the
bits, on every GPU and in the interpreter alike. Only a rotation sums in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvzip_press.kernels.row_codec.codes import CODECS, SCALE_DTYPE, Codes
from kvzip_press.kernels.triton_ops import dot

TILE = 8192  # most numbers of a program's rows, padded: 64 registers a thread
DOTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: a number below 2**22 that is added to it is rounded to a whole one


def encode_rows(rows: Tensor, name: str, rotated: bool, centres: Tensor | None) -> Codes:
    """See :func:`kvzip_press.kernels.row_codec.encode_rows`; for supported inputs only."""
    kind, lead, head_dim = CODECS[name], rows.shape[:-1], rows.shape[-1]
    codes = torch.empty(*lead, head_dim // kind.numbers_a_byte, dtype=kind.dtype, device=rows.device)
    scales = torch.empty(*lead, *([2] if kind.has_zero else []), dtype=SCALE_DTYPE, device=rows.device)
    if codes.numel() == 0:
        return Codes(codes, scales, name)
    shaped = rows.reshape(-1, *rows.shape[-3:]) if rows.ndim > 3 else rows[(None,) * (4 - rows.ndim)]
    n_rows, block_p = scales[..., 0].numel() if kind.has_zero else scales.numel(), _block(codes.shape[-1])
    block_n = max(16 if rotated else 1, min(128, TILE // (block_p * kind.numbers_a_byte)))
    with torch.cuda.device_of(rows):
        _encode_kernel[(triton.cdiv(n_rows, block_n),)](
            shaped,
            rows if centres is None else centres.contiguous(),
            codes.view(torch.uint8),
            scales.view(torch.int32 if kind.has_zero else torch.int16),
            *shaped.stride()[:3],
            n_rows,
            shaped.shape[1],
            shaped.shape[2],
            HEAD_DIM=head_dim,
            BITS=kind.bits,
            IS_FLOAT=name == "fp8",
            ROTATED=rotated,
            HAS_CENTRES=centres is not None,
            DOT=DOTS[rows.dtype],
            BLOCK_N=block_n,
            BLOCK_P=block_p,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return Codes(codes, scales, name)


def decode_rows(codes: Codes, dtype: torch.dtype) -> Tensor:
    """See :func:`kvzip_press.kernels.row_codec.decode_rows`; for supported inputs only."""
    kind, head_dim = CODECS[codes.codec], codes.head_dim
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    n_rows, block_p = out.numel() // head_dim, _block(codes.codes.shape[-1])
    block_n = max(1, min(128, TILE // (block_p * kind.numbers_a_byte)))
    scales = codes.scales.contiguous().view(torch.int32 if kind.has_zero else torch.int16)
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(n_rows, block_n),)](
            codes.codes.contiguous().view(torch.int8 if codes.codec == "int8" else torch.uint8),
            scales,
            scales if codes.groups is None else codes.groups.contiguous(),
            out.view(torch.int16) if dtype == torch.bfloat16 else out,
            n_rows,
            HEAD_DIM=head_dim,
            BITS=kind.bits,
            IS_FLOAT=codes.codec == "fp8",
            GROUPED=codes.groups is not None,
            BLOCK_N=block_n,
            BLOCK_P=block_p,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def _block(width: int) -> int:
    return triton.next_power_of_2(width)


@triton.jit
def _bf16_bits(x):
    """Returns finite numbers rounded to bf16 (to the nearest, ties to even), as their bits in an int32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _from_bf16(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _whole(x):
    """Returns numbers below 2**22 rounded to whole ones, ties to even."""
    return (x + ROUND) - ROUND


@triton.jit
def _e4m3_bits(x):
    """Returns numbers of at most 448 rounded to e4m3 (to the nearest, ties to even), as bytes in an int32."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of mantissa, exponents from -6
    small = _whole(size.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)  # below 2**-6, steps of 2**-9
    return tl.where(size < (121 << 23), small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _rotated(x, DOT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Multiplies rows [rows, HEAD_DIM] by the Hadamard matrix, whose signs are exact in any dtype."""
    offs = tl.arange(0, HEAD_DIM)
    parity = offs[:, None] & offs[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs = (1 - 2 * (parity & 1)).to(tl.float32).to(DOT)  # the interpreter does not make bf16 of integers
    return dot(x, signs, "ieee") * (HEAD_DIM**-0.5)


@triton.jit(do_not_specialize=["n_rows"])
def _encode_kernel(
    x_ptr,
    centres_ptr,
    codes_ptr,
    scales_ptr,
    stride_x0,
    stride_x1,
    stride_x2,
    n_rows,
    size_1,
    size_2,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_CENTRES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Encodes BLOCK_N rows. A row is [planes, numbers of a plane]: a byte takes one number of each plane."""
    A_BYTE: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = HEAD_DIM // A_BYTE
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_rows
    offs_a, offs_p = tl.arange(0, A_BYTE), tl.arange(0, BLOCK_P)
    mask_p = offs_p < PLANE
    segment = offs_n // size_2
    rows_ptr = x_ptr + (segment // size_1) * stride_x0 + (segment % size_1) * stride_x1 + (offs_n % size_2) * stride_x2
    channels = offs_a[:, None] * PLANE + offs_p[None, :]
    mask = mask_n[:, None, None] & mask_p[None, None, :]
    if ROTATED:
        tile = tl.load(rows_ptr[:, None] + tl.arange(0, HEAD_DIM)[None, :], mask_n[:, None], other=0.0)
        x = tl.reshape(_rotated(tile, DOT, HEAD_DIM), [BLOCK_N, A_BYTE, BLOCK_P])
    else:
        x = tl.load(rows_ptr[:, None, None] + channels[None, :, :], mask, other=0.0).to(tl.float32)
    if HAS_CENTRES:
        centres = centres_ptr + segment[:, None, None] * HEAD_DIM + channels[None, :, :]
        x -= tl.load(centres, mask, other=0.0).to(tl.float32)
    if BITS == 8:
        LARGEST: tl.constexpr = 448.0 if IS_FLOAT else 127.0
        peak = tl.max(tl.max(tl.abs(x), 2), 1)
        scale_bits = _bf16_bits(peak * (1.0 / LARGEST))
        tl.store(scales_ptr + offs_n, scale_bits.to(tl.int16), mask_n)
        scale = _from_bf16(scale_bits)
        units = tl.div_rn(x, tl.where(scale == 0, 1.0, scale)[:, None, None] + tl.zeros_like(x))
        if IS_FLOAT:
            numbers = _e4m3_bits(tl.minimum(tl.maximum(units, -LARGEST), LARGEST))
        else:
            numbers = tl.minimum(tl.maximum(_whole(units), -LARGEST), LARGEST).to(tl.int32)
    else:
        BELOW: tl.constexpr = 1 << (BITS - 1)
        ABOVE: tl.constexpr = BELOW - 1
        low = tl.min(tl.min(tl.where(mask, x, float("inf")), 2), 1)
        high = tl.max(tl.max(tl.where(mask, x, -float("inf")), 2), 1)
        low, high = tl.where(mask_n, low, 0.0), tl.where(mask_n, high, 0.0)
        zero_bits = _bf16_bits(low + (high - low) * (BELOW / (BELOW + ABOVE)))
        zero = _from_bf16(zero_bits)
        scale_bits = _bf16_bits(tl.maximum((high - zero) * (1.0 / ABOVE), (zero - low) * (1.0 / BELOW)))
        tl.store(scales_ptr + offs_n, (zero_bits << 16) | scale_bits, mask_n)
        scale = _from_bf16(scale_bits)
        divisor = tl.where(scale == 0, 1.0, scale)[:, None, None] + tl.zeros_like(x)
        units = _whole(tl.div_rn(x - zero[:, None, None], divisor))
        numbers = (tl.minimum(tl.maximum(units, -BELOW), ABOVE) + BELOW).to(tl.int32)
    packed = tl.sum(numbers << (BITS * offs_a)[None, :, None], 1).to(tl.uint8)
    tl.store(codes_ptr + offs_n[:, None] * PLANE + offs_p[None, :], packed, mask_n[:, None] & mask_p[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def _decode_kernel(
    codes_ptr,
    scales_ptr,
    groups_ptr,
    out_ptr,
    n_rows,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Decodes BLOCK_N rows, a plane of each byte's bits at a time."""
    A_BYTE: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = HEAD_DIM // A_BYTE
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_rows
    offs_a, offs_p = tl.arange(0, A_BYTE), tl.arange(0, BLOCK_P)
    mask_p = offs_p < PLANE
    channels = offs_a[:, None] * PLANE + offs_p[None, :]
    mask = mask_n[:, None, None] & mask_p[None, None, :]
    codes = tl.load(codes_ptr + offs_n[:, None] * PLANE + offs_p[None, :], mask_n[:, None] & mask_p[None, :], other=0)
    codes = codes.to(tl.int32)[:, None, :]
    if GROUPED:
        group = tl.load(groups_ptr + offs_n, mask_n, other=0).to(tl.int64)
        words = tl.load(scales_ptr + group[:, None, None] * HEAD_DIM + channels[None, :, :], mask, other=0)
    else:
        words = tl.load(scales_ptr + offs_n, mask_n, other=0).to(tl.int32)[:, None, None]
    if IS_FLOAT:  # the bits of an fp16 number that is 256 times as small
        bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
        numbers = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif BITS == 8:
        numbers = codes.to(tl.float32)
    else:
        numbers = ((codes >> (BITS * offs_a)[None, :, None]) & ((1 << BITS) - 1)).to(tl.float32) - (1 << (BITS - 1))
    x = numbers * _from_bf16(words)
    if BITS < 8:
        x += _from_bf16(words >> 16)
    if out_ptr.dtype.element_ty == tl.int16:  # bf16
        x = _bf16_bits(x)
    tl.store(out_ptr + offs_n[:, None, None] * HEAD_DIM + channels[None, :, :], x.to(out_ptr.dtype.element_ty), mask)
