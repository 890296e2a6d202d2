"""Words of 16 bits as numbers for the tensor cores, a plane of their bits at a time.

A plane is what is found at the same bits of all words: a low byte, a second nibble. One or two logical operations on
two words at once make one: what remains is a subnormal number of fp16, ``code * 2**-24``, which tensor cores multiply
exactly.
"""

import triton
import triton.language as tl

from kvzip_press.kernels.triton_ops import INTERPRETED

# Instructions on two words of 16 bits at a time: lop3 0x6A is (a & b) ^ c, 0xEA is (a & b) | c.
LOW_BYTE = tl.constexpr("lop3.b32 $0, $1, 0x00FF00FF, 0x00800080, 0x6A;")
HIGH_BYTE = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x00FF00FF, 0x00800080, 0x6A; }")
NIBBLE_0 = tl.constexpr("and.b32 $0, $1, 0x000F000F;")
NIBBLE_1 = tl.constexpr("and.b32 $0, $1, 0x00F000F0;")
NIBBLE_2 = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x000F000F; }")
NIBBLE_3 = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x00F000F0; }")
LOW_FLOAT = tl.constexpr(
    "{ .reg .b32 t, u; shl.b32 t, $1, 8; shr.u32 u, t, 1; and.b32 u, u, 0x3F803F80;"
    " lop3.b32 $0, t, 0x80008000, u, 0xEA; }"
)
HIGH_FLOAT = tl.constexpr(
    "{ .reg .b32 u; shr.u32 u, $1, 1; and.b32 u, u, 0x3F803F80; lop3.b32 $0, $1, 0x80008000, u, 0xEA; }"
)


@triton.jit
def plane_of(words, PLANE: tl.constexpr, BITS: tl.constexpr, IS_FLOAT: tl.constexpr, DOT: tl.constexpr):
    """Returns a plane of words of 16 bits as numbers: for integers (code + half of their range) * 2**-24.

    Every second nibble comes out 16 times as large, the 2 bits k of a byte 4**k times, and e4m3 numbers as themselves *
    2**-8.
    """
    if BITS == 2:
        bits = (words >> (8 * (PLANE // 4))) & (3 << (2 * (PLANE % 4)))
    elif INTERPRETED:
        if IS_FLOAT:
            high = words if PLANE else words << 8
            bits = (high & -32768) | ((high >> 1) & 0x3F80)
        elif BITS == 8:
            bits = ((words >> (8 * PLANE)) & 0x00FF) ^ 0x0080
        else:
            bits = (words >> (8 * (PLANE // 2))) & (0x00F0 if PLANE % 2 else 0x000F)
    elif IS_FLOAT:
        bits = _two_at_a_time(words, HIGH_FLOAT if PLANE else LOW_FLOAT)
    elif BITS == 8:
        bits = _two_at_a_time(words, HIGH_BYTE if PLANE else LOW_BYTE)
    elif PLANE < 2:
        bits = _two_at_a_time(words, NIBBLE_1 if PLANE else NIBBLE_0)
    else:
        bits = _two_at_a_time(words, NIBBLE_3 if PLANE == 3 else NIBBLE_2)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(DOT)


@triton.jit
def _two_at_a_time(words, ASM: tl.constexpr):
    """Applies an instruction of 32 bits to two words: Triton by itself takes them one by one."""
    return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def log2(x):
    """The hardware's logarithm, off by 2**-22: a fifth of the instructions of the exact one."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def channel(offs_w, PLANE: tl.constexpr, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Returns which number of a row is in a plane of a word; see CODECS."""
    A_BYTE: tl.constexpr = 8 // BITS
    return 2 * offs_w + PLANE // A_BYTE + (PLANE % A_BYTE) * (HEAD_DIM // A_BYTE)


@triton.jit
def query_plane(
    rows_ptr,
    mask_m,
    offs_w,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FACTOR: tl.constexpr,
    DOT: tl.constexpr,
):
    """Returns the query's channels of a plane [words, BLOCK_M], in the dtype of the dot."""
    mask = (offs_w < HEAD_DIM * BITS // 16)[:, None] & mask_m[None, :]
    query = tl.load(rows_ptr[None, :] + channel(offs_w, PLANE, BITS, HEAD_DIM)[:, None], mask, other=0.0)
    return (query.to(tl.float32) * FACTOR).to(DOT)


@triton.jit
def scale_of(meta):
    """Returns scales (fp32) from words that hold a bf16 scale, and above it, for nibbles, a bf16 zero."""
    return (meta.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def zero_of(meta):
    """Returns zeros (fp32) from words that hold a bf16 zero above a bf16 scale."""
    return (meta & -65536).to(tl.float32, bitcast=True)


@triton.jit
def store_plane(rows_ptr, out, mask_m, offs_w, PLANE: tl.constexpr, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Stores the channels of a plane [words, BLOCK_M] of rows."""
    mask = (offs_w < HEAD_DIM * BITS // 16)[:, None] & mask_m[None, :]
    tl.store(rows_ptr[None, :] + channel(offs_w, PLANE, BITS, HEAD_DIM)[:, None], out, mask)
