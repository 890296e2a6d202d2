"""Block sizes of the kernel that reads codes, chosen by shape: nothing is tuned at run time."""

from kvzip_press.kernels.ragged_attention.tuning import SHORT_CONTEXT, Config


def choose(n_rows: int, head_dim: int, bits: int, n_pairs: int) -> Config:
    """Returns the configuration for a shape; measured on an H200 (DESIGN.md of ``kernels``, "Codes").

    Args:
        n_rows: Query rows that share the pairs of one head: groups x query_length.
        head_dim: Size of a head.
        bits: Bits of a number of a key and of one of a value, added.
        n_pairs: Pairs of the packed context, all segments together; the tail does not count, as it grows.
    """
    if n_rows <= 8:
        if head_dim > 128:
            return Config(8, 64, 4, 3, 1)
        if n_pairs <= SHORT_CONTEXT:
            return Config(8, 32, 4, 3, 3)
        return Config(8, 128, 4, 3, 3 if bits == 8 else 2)
    if n_rows > 16:
        return Config(32, 32, 4, 2, 1)
    if head_dim > 128:
        return Config(16, 64, 4, 3, 1)
    if n_pairs <= SHORT_CONTEXT:
        return Config(16, 32, 4, 3, 3)
    return Config(16, 128, 4, 3, 3 if bits == 8 else 2)  # as many as registers allow
