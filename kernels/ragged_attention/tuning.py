"""Block sizes of the Triton kernel, chosen by shape from measurements: nothing is tuned at run time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """The kernel's launch parameters.

    Attributes:
        block_m: Query rows (group members times query tokens) of a program, a power of two >= 16; of codes >= 8.
        block_n: Keys of a tile, a power of two >= 16.
        num_warps: Warps of a program.
        num_stages: One more than the tiles in flight.
        programs_per_sm: Programs per multiprocessor that are resident at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


MANY_SEGMENTS = 32
SHORT_CONTEXT = 16_384  # pairs of all segments
MIDDLE_CONTEXT = 65_536


def choose(n_rows: int, head_dim: int, itemsize: int, n_pairs: int, n_segments: int) -> Config:
    """Returns the configuration for a shape; measured on an H200 (DESIGN.md of ``kernels``, "Tuning").

    Args:
        n_rows: Query rows that share the pairs of one head: groups x query_length.
        head_dim: Size of a head.
        itemsize: Bytes of an element.
        n_pairs: Pairs of the packed context, all segments together. The tail does not count: the choice must stay the
            same while the tail grows, also in a captured graph, whose tail has room for more.
        n_segments: Batch rows x KV heads.
    """
    wide = head_dim * itemsize > 256  # bytes of a key
    if n_rows > 16:
        block_m = 32 if n_rows <= 32 else 64
        return Config(block_m, 32, 8, 2, 1) if wide else Config(block_m, 64, 4, 3, 1)
    if wide:
        return Config(16, 64 if itemsize == 2 else 32, 4, 3, 1)
    if n_segments >= MANY_SEGMENTS:
        return Config(16, 32, 4, 3, 3)
    if n_pairs <= SHORT_CONTEXT:
        return Config(16, 32, 4, 4, 3)
    if n_pairs <= MIDDLE_CONTEXT:
        return Config(16, 64, 4, 3, 1)
    return Config(16, 64, 4, 4, 1) if n_rows > 4 else Config(16, 64, 4, 3, 2)
