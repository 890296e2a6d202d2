"""Block sizes of the kernel that reads codes, chosen by shape: nothing is tuned at run time."""

from kvzip_press.kernels.ragged_attention.tuning import MANY_SEGMENTS, MIDDLE_CONTEXT, SHORT_CONTEXT, Config


def choose(
    n_rows: int, head_dim: int, bits: int, n_pairs: int, n_segments: int, columns: int, *, in_groups: bool = False
) -> Config:
    """Returns the configuration for a shape; measured on an H200 (DESIGN.md of ``kernels``, "Codes").

    Args:
        n_rows: Query rows that share the pairs of one head: groups x query_length.
        head_dim: Size of a head.
        bits: Bits of a number of a key and of one of a value, added.
        n_pairs: Pairs of the packed context, all segments together; the tail does not count, as it grows.
        n_segments: Batch rows x KV heads.
        columns: Fewest query rows that a product may have as its columns.
        in_groups: Whether keys share the scales of their channels, which are read for each key: stages of these take
            much memory on the chip. Not measured.
    """
    if n_rows > 16:
        return Config(32, 32, 4, 2, 1)
    block_m = columns if n_rows <= columns else 16
    if in_groups:
        return Config(block_m, 32 if head_dim > 128 else 64, 4, 2, 2)
    if head_dim > 128:
        return Config(block_m, 64, 4, 3, 1)
    if n_pairs <= SHORT_CONTEXT:
        return Config(block_m, 32, 4, 3, 3)
    if n_pairs <= MIDDLE_CONTEXT:
        return Config(block_m, 64, 4, 3, 1)
    if bits > 8 and n_segments < MANY_SEGMENTS:
        return Config(block_m, 128, 4, 3, 2)
    return Config(block_m, 64, 4, 3, 3 if bits == 16 else 4)  # as many as registers allow


def rows_of_tile(key_bytes: int) -> int:
    """Returns how many exact rows make a tile beside codes: few, so that they ask for no more memory than codes do."""
    return 32 if key_bytes <= 256 else 16
