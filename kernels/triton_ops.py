"""What the Triton kernels share."""

import triton
import triton.language as tl

from kvzip_press.kernels.triton_support import interpreting

_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``tl.dot`` with fp32 sums. Triton's interpreter would multiply the bits of bf16 numbers as integers."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, which Triton has only in CUDA's own library."""
    return 1 - 2 / (tl.exp2(x * (2 * 1.4426950408889634)) + 1)
