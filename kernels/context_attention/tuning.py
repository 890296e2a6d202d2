"""Block sizes of the Triton kernel by shape: nothing is tuned at run time, and nothing depends on what tokens read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sharing:
    """How a step is cut, which its plan decides.

    Attributes:
        block_m: Query rows of a program, a power of two >= 16.
        programs_per_sm: Programs per multiprocessor that share the pairs; all of them are resident at once.
    """

    block_m: int
    programs_per_sm: int


@dataclass(frozen=True)
class Loop:
    """How a program reads its pairs.

    Attributes:
        block_n: Keys of a tile, a power of two >= 16.
        num_warps: Warps of a program.
        num_stages: One more than the tiles in flight.
    """

    block_n: int
    num_warps: int
    num_stages: int


def sharing_for(n_tokens: int, groups: int) -> Sharing:
    """Returns how to cut a step; not yet measured: 64 rows need no more cycles than the bytes of a tile take.

    Args:
        n_tokens: Tokens of the step.
        groups: Query heads of a key-value head.
    """
    n_rows = n_tokens * groups
    return Sharing(16 if n_rows <= 16 else 32 if n_rows <= 32 else 64, 1)


def loop_for(block_m: int, head_dim: int, itemsize: int, *, has_codes: bool) -> Loop:
    """Returns how to read pairs: as :mod:`kvzip_press.kernels.ragged_attention.tuning` measured it for as many rows.

    Codes are an exception: many rows of them in tiles of 128 take 0.87 to 0.91 of the time (one H200, four cases).

    Args:
        block_m: Query rows of a program.
        head_dim: Channels of a head.
        itemsize: Bytes of a number of the queries.
        has_codes: Whether pairs are codes of 8 bits.
    """
    wide = head_dim * itemsize > 256  # bytes of a key as queries see it
    if block_m > 32 and has_codes and not wide:
        return Loop(128, 4, 2)
    if block_m > 16:
        return Loop(32, 8, 2) if wide else Loop(64, 4, 3)
    return Loop(64 if itemsize == 2 or not wide else 32, 4, 3)
