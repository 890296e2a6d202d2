"""Do times differ? The fastest and the slowest cell, beside the spread of one cell's contexts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvzip_press.leaderboard.analysis.summary import context_key, ms_per_token, one_table, split
from kvzip_press.leaderboard.rows.results import Row

_BAND = (5, 95)  # percentiles: nine contexts of ten lie between


@dataclass(frozen=True)
class Times:
    """How far the times a token of a table's cells lie apart, and how far those of one cell's contexts.

    A time is compared with that of the other cells on the same context, because contexts and answers differ in length.

    Attributes:
        apart: The slowest cell's time over the fastest's, each the median over contexts; at least 1.
        spread: The factor within which nine of ten contexts of one cell lie; at least 1.
    """

    apart: float
    spread: float

    @property
    def differ(self) -> bool:
        """Whether the cells are further apart than the contexts of one cell."""
        return self.apart > self.spread


def times(rows: Iterable[Row]) -> Times | None:
    """Returns how far times lie apart; None with fewer than two cells or contexts that have times.

    Args:
        rows: Rows of one table.

    Raises:
        InvalidArgumentError: Rows of several tables.
    """
    rows = one_table(rows)
    found = {
        (group[0].press, group[0].compression_ratio, context_key(group[0])): ms
        for group in split(rows, lambda row: (row.press, row.compression_ratio, context_key(row)))
        if (ms := ms_per_token(group))
    }
    cells, contexts = dict.fromkeys(key[:2] for key in found), dict.fromkeys(key[2] for key in found)
    if len(cells) < 2 or len(contexts) < 2:
        return None
    logs = np.array([[math.log(found.get((*cell, context), math.nan)) for cell in cells] for context in contexts])
    relative = logs - np.nanmedian(logs, axis=1, keepdims=True)
    medians = np.nanmedian(relative, axis=0)
    low, high = np.nanpercentile(relative - medians, _BAND)
    return Times(apart=float(np.exp(medians.max() - medians.min())), spread=float(np.exp(high - low)))
