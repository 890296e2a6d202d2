"""What encoded rows are: codes, scales, and the codec that says how to read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_device, check_dtype, check_shape

SCALE_DTYPE = torch.bfloat16
"""Dtype of scales and zeros: with the exponents of fp32, no row of any model overflows or underflows it.

Its 8 significant bits cost nothing: codes are made with the rounded scale, and rounding it moves the largest number of
a row by less than half a step.
"""


@dataclass(frozen=True)
class Codec:
    """How a number becomes a code.

    Attributes:
        dtype: dtype of the codes as they are stored.
        bits: bits of a number.
        has_zero: whether a row has a zero beside its scale: ``scale * code + zero``.
    """

    dtype: torch.dtype
    bits: int
    has_zero: bool

    @property
    def numbers_a_byte(self) -> int:
        """Numbers that share a byte."""
        return 8 // self.bits

    @property
    def factors(self) -> list[float]:
        """What makes codes of each plane of a byte's bits, read where they lie: 1, and a power of two for higher bits.

        A plane is a stretch of a row, see :data:`CODECS`.
        """
        return [0.5 ** (self.bits * plane) for plane in range(self.numbers_a_byte)]


CODECS = {
    "int8": Codec(torch.int8, 8, has_zero=False),
    "fp8": Codec(torch.float8_e4m3fn, 8, has_zero=False),
    "int4": Codec(torch.uint8, 4, has_zero=True),
    "int2": Codec(torch.uint8, 2, has_zero=True),
}
"""The codecs by name.

int8 and fp8 (e4m3) are symmetric: ``scale * code``, so zeros stay zeros. int4 and int2 are ``scale * code + zero`` with
codes of -8 .. 7 and -2 .. 1, stored with 8 and 2 added: byte j of a row of d numbers holds, from its low bits up,
numbers j and j + d / 2 (int4), or j, j + d / 4, j + d / 2 and j + 3 d / 4 (int2). So a plane of equal bits is a
contiguous stretch of a row, and neither decoding nor a matrix product has to interleave anything.
"""


def codec_named(name: str) -> Codec:
    """Returns a codec by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CODECS:
        raise ValueError(f"codec: expected one of {sorted(CODECS)}, got {name!r}")
    return CODECS[name]


@dataclass(frozen=True)
class Codes:
    """Encoded rows, each with a scale of its own, or with those of its group's channels.

    Attributes:
        codes: [..., head_dim * bits / 8], int8, float8_e4m3fn or uint8.
        scales: bf16 [...] for "int8" and "fp8", [..., 2] (scale, zero) for "int4" and "int2"; with ``groups``
            [num_groups, head_dim, 2].
        codec: a name of :data:`CODECS`.
        groups: int32 [n], the group of each row [n, head_dim]; None if rows have scales of their own.
    """

    codes: Tensor
    scales: Tensor
    codec: str
    groups: Tensor | None = None

    @property
    def head_dim(self) -> int:
        """Numbers of a row."""
        return self.codes.shape[-1] * CODECS[self.codec].numbers_a_byte

    @property
    def shape(self) -> torch.Size:
        """Shape of the decoded rows, [..., head_dim]."""
        return torch.Size((*self.codes.shape[:-1], self.head_dim))

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and groups."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.groups is None else self.groups.nbytes)

    def __getitem__(self, rows: slice) -> Codes:
        """Returns a stretch of the first dimension, without copying."""
        if self.groups is None:
            return replace(self, codes=self.codes[rows], scales=self.scales[rows])
        return replace(self, codes=self.codes[rows], groups=self.groups[rows])

    def check(self, name: str) -> None:
        """Raises ValueError or TypeError unless the tensors fit the codec and each other; ``name`` is theirs."""
        kind = codec_named(self.codec)
        check_dtype(f"{name}.codes", self.codes, kind.dtype)
        check_dtype(f"{name}.scales", self.scales, SCALE_DTYPE)
        check_device(f"{name}.scales", self.scales, self.device)
        rows = self.codes.shape[:-1]
        if self.groups is not None:
            check_shape(f"{name}.groups", self.groups, rows, "n")
            check_dtype(f"{name}.groups", self.groups, torch.int32)
            check_device(f"{name}.groups", self.groups, self.device)
            expected, dims = (*self.scales.shape[:1], self.head_dim, 2), "num_groups, head_dim, 2"
        elif kind.has_zero:
            expected, dims = (*rows, 2), "rows of codes, 2"
        else:
            expected, dims = (*rows,), "rows of codes"
        if self.scales.shape != torch.Size(expected):
            raise ValueError(f"{name}.scales: expected [{dims}] = {expected}, got shape {tuple(self.scales.shape)}")


def check_width(name: str, width: int, kind: Codec) -> None:
    """Raises ValueError unless rows of ``width`` numbers fill whole bytes."""
    if width < 1 or width % kind.numbers_a_byte:
        raise ValueError(
            f"{name}: expected a head_dim that is a multiple of {kind.numbers_a_byte}, because {kind.bits} bits a "
            f"number fill whole bytes only then, got {width}; use int8 or fp8 for this model"
        )
