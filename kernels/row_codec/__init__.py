"""Rows of numbers in 8, 4 or 2 bits: encoding, decoding, and the rotation that spreads outliers before it."""

from kvzip_press.kernels.row_codec.api import (
    decode_rows,
    encode_groups,
    encode_rows,
    groups_of,
    plane_factors,
    row_scales,
    write_numbers,
)
from kvzip_press.kernels.row_codec.codes import CODECS, Codes
from kvzip_press.kernels.row_codec.rotation import rotate

__all__ = [
    "CODECS",
    "Codes",
    "decode_rows",
    "encode_groups",
    "encode_rows",
    "groups_of",
    "plane_factors",
    "rotate",
    "row_scales",
    "write_numbers",
]
