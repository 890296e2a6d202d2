"""Encoding and decoding in plain PyTorch, on any device; sums and ranges are fp32 (fp64 for fp64 rows)."""

import torch
from torch import Tensor

from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.row_codec.codes import CODECS, SCALE_DTYPE, Codec, Codes
from kvzip_press.kernels.row_codec.rotation import rotate

_LARGEST = {"int8": 127.0, "fp8": 448.0}  # e4m3 has no infinity; what lies beyond would become NaN


def encode_rows(rows: Tensor, name: str, rotated: bool, centres: Tensor | None) -> Codes:
    """See :func:`kvzip_press.kernels.row_codec.encode_rows`."""
    kind = CODECS[name]
    exact = rows.to(accumulation_dtype(rows.dtype))
    if rotated:
        exact = rotate(exact)
    if centres is not None:
        exact = exact - centres.unsqueeze(-2)
    if kind.has_zero:
        low, high = exact.aminmax(dim=-1)
        scales = ranges(low, high, kind)
        steps = _steps(exact, scales.unsqueeze(-2), kind)
        return Codes(packed(steps, kind), scales, name)
    limit = _LARGEST[name]
    # Times 1 / limit, as PyTorch divides by a number on a GPU: so codes are the same on all devices.
    scales = (exact.abs().amax(-1) * (1 / limit)).to(SCALE_DTYPE)
    units = exact / _divisor(scales, exact.dtype).unsqueeze(-1)
    codes = units.round_().clamp_(-limit, limit) if name == "int8" else units.clamp_(-limit, limit)
    return Codes(codes.to(kind.dtype), scales, name)


def decode_rows(codes: Codes, dtype: torch.dtype) -> Tensor:
    """See :func:`kvzip_press.kernels.row_codec.decode_rows`."""
    kind = CODECS[codes.codec]
    exact = accumulation_dtype(dtype)
    if not kind.has_zero:
        return codes.codes.to(exact).mul_(codes.scales.to(exact).unsqueeze(-1)).to(dtype)
    if codes.groups is None:
        return _affine(codes.codes, codes.scales.unsqueeze(-2), kind, exact).to(dtype)
    scales = codes.scales.flatten(1).index_select(0, codes.groups).unflatten(-1, (-1, 2))
    return _affine(codes.codes, scales, kind, exact).to(dtype)


def encode_groups(rows: Tensor, groups: Tensor, num_groups: int, name: str) -> Codes:
    """See :func:`kvzip_press.kernels.row_codec.encode_groups`."""
    kind = CODECS[name]
    exact = rows.to(accumulation_dtype(rows.dtype))
    index = groups.long().unsqueeze(-1).expand_as(exact)
    empty = exact.new_zeros(num_groups, rows.shape[-1])
    low = empty.scatter_reduce(0, index, exact, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, exact, "amax", include_self=False)
    scales = ranges(low, high, kind)
    return Codes(packed(_steps(exact, scales[groups], kind), kind), scales, name, groups)


def write_numbers(codes: Codes, out: Tensor) -> Tensor:
    """See :func:`kvzip_press.kernels.row_codec.write_numbers`."""
    kind = CODECS[codes.codec]
    if codes.codec == "fp8":
        out[0].copy_(_fp8_as_fp16(codes.codes))
    elif not kind.has_zero:
        out[0].copy_(codes.codes)
    else:
        words, mask = _words(codes.codes), (1 << kind.bits) - 1
        masks = torch.full((words.element_size(),), mask, dtype=torch.uint8, device=words.device).view(words.dtype)
        for plane, numbers in enumerate(out):
            numbers.copy_((words & (masks << (kind.bits * plane))).view(torch.uint8))
    return out if codes.groups is None else _of_groups(codes, kind, out)


def row_scales(codes: Codes, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`kvzip_press.kernels.row_codec.row_scales`."""
    kind = CODECS[codes.codec]
    if codes.groups is not None:
        return None, None
    if not kind.has_zero:
        scale = codes.scales.to(dtype)
        return scale.mul_(256.0) if codes.codec == "fp8" else scale, None
    scale, zero = codes.scales.to(dtype).T.contiguous()
    return scale, zero.sub_(scale, alpha=1 << (kind.bits - 1))


def ranges(low: Tensor, high: Tensor, kind: Codec) -> Tensor:
    """Returns scale and zero [..., 2] with which codes reach from ``low`` to ``high`` [...], however they are rounded.

    The zero is rounded first, and the scale is what then reaches both ends.
    """
    below = float(1 << (kind.bits - 1))
    above = below - 1
    zero = (low + (high - low) * (below / (below + above))).to(SCALE_DTYPE)
    exact = zero.to(low.dtype)
    scale = torch.maximum((high - exact) * (1 / above), (exact - low) * (1 / below)).to(SCALE_DTYPE)
    return torch.stack([scale, zero], -1)


def packed(codes: Tensor, kind: Codec) -> Tensor:
    """Packs uint8 [..., d] of few bits into bytes [..., d * bits / 8]; see CODECS for which numbers share one."""
    planes = codes.chunk(kind.numbers_a_byte, -1)
    out = planes[0].clone()
    for number, plane in enumerate(planes[1:], 1):
        out |= plane << (number * kind.bits)
    return out


def unpacked(codes: Tensor, kind: Codec) -> Tensor:
    """Returns what :func:`packed` packed: uint8 [..., d], with half of the range of the codes still added."""
    mask = (1 << kind.bits) - 1
    return torch.cat([(codes >> (number * kind.bits)) & mask for number in range(kind.numbers_a_byte)], -1)


def _steps(exact: Tensor, scales: Tensor, kind: Codec) -> Tensor:
    """Returns codes of numbers [..., d] as uint8, half of the range added; scales [..., d or 1, 2]."""
    half = 1 << (kind.bits - 1)
    units = (exact - scales[..., 1].to(exact.dtype)) / _divisor(scales[..., 0], exact.dtype)
    return units.round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)


def _affine(codes: Tensor, scales: Tensor, kind: Codec, exact: torch.dtype) -> Tensor:
    """Returns ``scale * code + zero`` in a dtype, of codes [..., d * bits / 8] and scales [..., d or 1, 2]."""
    half = 1 << (kind.bits - 1)
    numbers = unpacked(codes, kind).to(exact).sub_(half)
    return numbers.mul_(scales[..., 0]).add_(scales[..., 1])


def _words(codes: Tensor) -> Tensor:
    """Returns bytes as words of 64 bits, of which a CPU masks eight at a time, if rows consist of whole words."""
    whole = codes.shape[-1] % 8 == 0 and codes.is_contiguous() and codes.storage_offset() % 8 == 0
    return codes.view(torch.int64) if whole else codes


def _of_groups(codes: Codes, kind: Codec, out: Tensor) -> Tensor:
    """Multiplies numbers [planes, n, width] with the scales of their groups' channels and adds the zeros."""
    assert codes.groups is not None
    if not len(codes.groups):
        return out
    low, high = (int(x) for x in codes.groups.aminmax())
    scale, zero = codes.scales[low : high + 1].to(out.dtype).unbind(-1)
    zero = torch.sub(zero, scale, alpha=1 << (kind.bits - 1))
    scale, zero = (x.unflatten(-1, (len(out), -1)).transpose(0, 1) for x in (scale, zero))
    scale = scale * scale.new_tensor(kind.factors)[:, None, None]
    groups = codes.groups - low
    return torch.addcmul(zero.index_select(1, groups), out, scale.index_select(1, groups), out=out)


def _fp8_as_fp16(codes: Tensor) -> Tensor:
    """Returns e4m3 numbers times 2**-8 as fp16: the same bits in other places, on a CPU 7 times as fast as a cast."""
    bits = codes.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    return ((bits << 7) & ~0x4000).view(torch.float16)


def _divisor(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the scale to divide by: 1 for 0, so that a row of equal numbers gives codes of 0 and not 0 / 0."""
    return scale.to(dtype).masked_fill(scale == 0, 1.0)
