"""Checks and dispatch of :func:`encode_rows`, :func:`decode_rows`, and their twins for groups of rows."""

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_device, check_dtype, check_floating, check_rank, check_shape
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.row_codec import reference, support
from kvzip_press.kernels.row_codec.codes import Codes, check_width, codec_named
from kvzip_press.kernels.row_codec.rotation import check_rotates

_TRITON = "kvzip_press.kernels.row_codec.triton"
_ENCODE = {
    "triton": Impl(deferred(_TRITON, "encode_rows"), support.reason_against_encoding),
    "reference": Impl(reference.encode_rows),
}
_DECODE = {
    "triton": Impl(deferred(_TRITON, "decode_rows"), support.reason_against_decoding),
    "reference": Impl(reference.decode_rows),
}
_ENCODE_GROUPS = {"reference": Impl(reference.encode_groups)}


def encode_rows(
    rows: Tensor,
    codec: str,
    *,
    rotated: bool = False,
    centres: Tensor | None = None,
    impl: str | None = None,
) -> Codes:
    """Encodes rows, each with a scale of its own; the same codes by every implementation.

    A decoded number differs from the original by at most half a step, which is the row's scale. "int8": the largest
    absolute number / 127, rounded to bf16. "int4" and "int2": about (largest - smallest) / 15 or 3; rounding the zero
    to bf16 adds up to its absolute value / 1792 (int4) or / 256 (int2). "fp8" has steps of its own: a number errs by
    at most a 16th of itself, or by a 1024th of the row's scale if that is more. Rows of zeros decode to zeros, rows of
    equal numbers to that number within these bounds.

    Args:
        rows: [..., head_dim], any floating dtype and strides; all finite, which is not checked (on a GPU that would
            wait for the device): the codes of other rows are without meaning.
        codec: "int8", "fp8" (e4m3), "int4" or "int2"; head_dim must be a multiple of 2 for "int4", of 4 for "int2".
        rotated: whether rows are first multiplied by the Hadamard matrix, as :func:`rotate` does; the sums of
            implementations then differ by roundings, and a number that lies between two codes may get either.
        centres: what is subtracted from (rotated) rows before they are encoded, [..., head_dim] for rows
            [..., n, head_dim], any floating dtype; None for nothing.
        impl: "triton" (one pass; CUDA devices, or a CPU with ``TRITON_INTERPRET=1``; fp16, bf16 and fp32, head_dim up
            to 1024, rotated from 16 to 256, last dimension contiguous), "reference" (plain PyTorch, any device) or
            None: the first that can do this input.

    Returns:
        Codes; their attributes say in which dtypes and shapes.

    Raises:
        ValueError: a shape, device, ``codec`` or ``impl`` is not as above, ``impl`` cannot do this input, or rows of
            this width cannot be rotated.
        TypeError: a dtype is not floating point.
    """
    kind = codec_named(codec)
    check_floating("rows", rows)
    check_width("rows", rows.shape[-1] if rows.ndim else 0, kind)
    if rotated:
        check_rotates(rows.shape[-1])
    if centres is not None:
        if rows.ndim < 2:
            raise ValueError(f"rows: expected [..., n, head_dim] with centres, got shape {tuple(rows.shape)}")
        check_shape("centres", centres, (*rows.shape[:-2], rows.shape[-1]), ", ".join(["n"] * (rows.ndim - 1)))
        check_floating("centres", centres)
        check_device("centres", centres, rows.device)
    return select("encode_rows", _ENCODE, impl, rows, codec, rotated, centres)(rows, codec, rotated, centres)


def decode_rows(codes: Codes, dtype: torch.dtype = torch.float32, *, impl: str | None = None) -> Tensor:
    """Decodes what :func:`encode_rows` or :func:`encode_groups` encoded, or any selection of its rows.

    Args:
        codes: encoded rows [..., head_dim].
        dtype: of the result; a product and a sum are fp32 (fp64 for fp64) and rounded to it once.
        impl: as in :func:`encode_rows`; the same numbers by every implementation.

    Returns:
        [..., head_dim], contiguous.

    Raises:
        ValueError: a shape, device or ``impl`` is not as above.
        TypeError: a dtype is not as above.
    """
    codes.check("codes")
    return select("decode_rows", _DECODE, impl, codes, dtype)(codes, dtype)


def write_numbers(codes: Codes, out: Tensor) -> Tensor:
    """Writes codes as numbers into a buffer, a plane of each byte's bits at a time: for the inner loop of an op.

    What is written is multiplied with the plane's factor (:attr:`~kvzip_press.kernels.row_codec.codes.Codec.factors`),
    with the row's scale, and its zero is added, to give the row: :func:`row_scales` has the last two. Codes in groups
    are written with scales and zeros, and have factors of 1: see :func:`plane_factors`.

    Args:
        codes: encoded rows [n, head_dim], not checked.
        out: [planes, n, head_dim / planes], contiguous, fp32 or fp64, written over; a codec has 8 / bits planes.

    Returns:
        ``out``.
    """
    return reference.write_numbers(codes, out)


def row_scales(codes: Codes, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Returns what makes rows of numbers that :func:`write_numbers` wrote.

    Args:
        codes: encoded rows [n, head_dim], not checked.
        dtype: fp32 or fp64.

    Returns:
        The scale [n] and the zero [n] of each row, in ``dtype``; None stands for a scale of 1 and a zero of 0.
    """
    return reference.row_scales(codes, dtype)


def plane_factors(codes: Codes) -> list[float]:
    """Returns the factor of each plane that :func:`write_numbers` writes."""
    factors = codec_named(codes.codec).factors
    return factors if codes.groups is None else [1.0] * len(factors)


def groups_of(cu_seqlens: Tensor, total: int, group_size: int = 32) -> tuple[Tensor, int]:
    """Numbers groups of consecutive rows in packed segments: none crosses a segment, whose last one may be short.

    Args:
        cu_seqlens: int32 [segments + 1], rising from 0 to ``total``.
        total: rows of all segments.
        group_size: rows of a group, 1 or more.

    Returns:
        int32 [total], the group of each row, never falling; and the number of groups, which is read from the device.

    Raises:
        ValueError: ``group_size`` is below 1.
    """
    if group_size < 1:
        raise ValueError(f"group_size: expected 1 or more, got {group_size}")
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    counts = (lengths + group_size - 1) // group_size
    firsts = counts.cumsum(0) - counts
    segments = torch.repeat_interleave(lengths, output_size=total)
    within = torch.arange(total, device=bounds.device) - bounds[segments]
    return (firsts[segments] + within // group_size).to(torch.int32), int(counts.sum())


def encode_groups(rows: Tensor, groups: Tensor, num_groups: int, codec: str, *, impl: str | None = None) -> Codes:
    """Encodes rows with a scale and a zero for each channel of each group of rows (keys in KIVI, arXiv 2402.02750).

    The error is that of :func:`encode_rows`, with the range of a channel in a group in place of that of a row.

    Args:
        rows: [n, head_dim], any floating dtype; all finite, which is not checked.
        groups: int32 [n], the group of each row, 0 .. num_groups - 1 (:func:`groups_of`).
        num_groups: number of groups; one without rows gets zeros.
        codec: "int4" or "int2".
        impl: "reference" (plain PyTorch, any device) or None.

    Returns:
        Codes with ``groups``; their scales are [num_groups, head_dim, 2].

    Raises:
        ValueError: a shape, device, ``codec`` or ``impl`` is not as above.
        TypeError: a dtype is not as above.
    """
    kind = codec_named(codec)
    if not kind.has_zero:
        raise ValueError(f"codec: expected 'int4' or 'int2' for groups, got {codec!r}")
    check_rank("rows", rows, "n, head_dim")
    check_floating("rows", rows)
    check_width("rows", rows.shape[-1], kind)
    check_shape("groups", groups, rows.shape[:1], "n")
    check_dtype("groups", groups, torch.int32)
    check_device("groups", groups, rows.device)
    return select("encode_groups", _ENCODE_GROUPS, impl, rows)(rows, groups, num_groups, codec)
