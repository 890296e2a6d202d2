"""Tiles of the two passes, chosen by shape from what the compiler says; nothing is tuned at run time.

Those of 16 bits are the ones that were measured for KVzip's score (``kv_scoring``), whose passes are alike.
"""

from kvzip_press.kernels.kv_scoring.tuning import Config


def row_config(n_rows: int, head_dim: int, itemsize: int) -> Config:
    """Returns the tiles of the first pass, for so many query rows of a key-value head; none spills registers."""
    if itemsize == 4:  # no tensor cores: operands are in registers
        return Config(16 if n_rows <= 16 else 32, 32, 8, 1)
    if n_rows <= 16:
        return Config(16, 128, 4, 3 if head_dim <= 128 else 2)
    return Config(64, 64, 4, 3) if head_dim <= 128 else Config(64, 64, 8, 2)


def column_config(n_rows: int, head_dim: int, itemsize: int) -> Config:
    """Returns the tiles of the second pass, for so many query rows of a key-value head; none spills registers."""
    if itemsize == 4:
        return Config(16 if n_rows <= 16 else 32, 32, 8, 2)
    block_m = 16 if n_rows <= 16 else 64
    return Config(block_m, 128, 4, 3 if head_dim <= 128 else 2)
