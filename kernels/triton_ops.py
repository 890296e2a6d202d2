"""Functions that the Triton kernels share."""

import triton
import triton.language as tl

from kvzip_press.kernels.triton_support import interpreting

INTERPRETED = tl.constexpr(interpreting())
HAS_NARROW_DOT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)
"""Whether a dot may have fewer than 16 columns."""
LOG2_E = 1.4426950408889634


def padded(head_dim: int) -> int:
    """Returns the columns of a tile: a power of two that a dot product of tiles supports."""
    return max(16, triton.next_power_of_2(head_dim))


def logit_factors(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Returns what turns dot products into logits in base 2: the factor before the softcap, and the softcap."""
    return (scaling * LOG2_E, 0.0) if softcap is None else (scaling / softcap, softcap * LOG2_E)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``tl.dot`` with fp32 sums. Triton's interpreter alone would multiply the bits of bf16 numbers as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def base2_logits(scores, factor, softcap, HAS_SOFTCAP: tl.constexpr):
    """Turns dot products into logits in base 2, see :func:`logit_factors`."""
    if HAS_SOFTCAP:
        return softcap * tanh(scores * factor)
    return scores * factor


@triton.jit
def tanh(x):
    """tanh to a relative error of about 1e-7; near 0, where 1 - 2 / (exp(2x) + 1) cancels, by an odd polynomial."""
    square = x * x
    near = ((0.01560795 * square - 0.05220784) * square + 0.1331301) * square - 0.33332589
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # 2 log2(e)
    return tl.where(square < 0.36, x + x * square * near, far)
