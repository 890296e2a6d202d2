"""Judges every press against the full cache and KVzip, and gives the marks that tables and pages show."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvzip_press.leaderboard.analysis.statistics import N_RESAMPLES, Comparison, compare
from kvzip_press.leaderboard.analysis.summary import find_full, one_table
from kvzip_press.leaderboard.rows.results import Row

CellKey = tuple[str, float]
"""A press's label and its ratio."""

MARKS_CAPTION = (
    "† less accurate than the full cache; ‡ less, § more accurate than KVzip at the same ratio (paired by context, "
    "sign-flip test, 5 % over all cells by Holm's method)."
)
_KVZIP = re.compile(
    r"kvzip($|[ (,])", re.IGNORECASE
)  # "KVzip (local replay)", but neither "KVzip-head" nor "Fast KVzip"


@dataclass(frozen=True)
class Judgement:
    """How every cell of a table compares with the references.

    Attributes:
        full: The label of the full cache, None if the table has none.
        kvzip: The label of KVzip, None if the table has none.
        against_full: The comparisons with the full cache, by press and ratio.
        against_kvzip: The comparisons with KVzip at the same ratio.
    """

    full: str | None
    kvzip: str | None
    against_full: Mapping[CellKey, Comparison] = field(default_factory=dict)
    against_kvzip: Mapping[CellKey, Comparison] = field(default_factory=dict)

    def marks(self, press: str, compression_ratio: float) -> str:
        """Returns the marks of a cell, explained in `MARKS_CAPTION`; empty if nothing is significant."""
        key = press, compression_ratio
        full, kvzip = self.against_full.get(key), self.against_kvzip.get(key)
        below_full = full is not None and full.is_significant and full.difference < 0
        beside_kvzip = "" if kvzip is None or not kvzip.is_significant else "‡" if kvzip.difference < 0 else "§"
        return ("†" if below_full else "") + beside_kvzip


def judge(rows: Iterable[Row], *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Judgement:
    """Compares every cell of a table with the full cache and with KVzip.

    Args:
        rows: Rows of one table; only those of one task to judge the presses on that task.
        seed: As for `compare`.
        n_resamples: As for `compare`.

    Raises:
        InvalidArgumentError: Rows of several tables.
        MissingDependencyError: scipy is absent.
    """
    rows = one_table(rows)
    full, kvzip = find_full(rows), find_kvzip(rows)

    def against(reference: str | None) -> dict[CellKey, Comparison]:
        found = [] if reference is None else compare(rows, reference, seed=seed, n_resamples=n_resamples)
        return {(comparison.press, comparison.compression_ratio): comparison for comparison in found}

    return Judgement(full, kvzip, against(full), against(kvzip))


def find_kvzip(rows: Iterable[Row]) -> str | None:
    """Returns the label of KVzip: "KVzip" itself, case ignored, else its first variant ("KVzip (local replay)")."""
    labels = list(dict.fromkeys(row.press for row in rows))
    found = [label for label in labels if _KVZIP.match(label)]
    return next((label for label in found if label.lower() == "kvzip"), found[0] if found else None)
