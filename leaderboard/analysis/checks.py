"""Refuses rows whose values are beyond all measure, before anything is computed of them.

That values are of the right kind and finite is seen where a row is made (`rows/sealed_line.py`).
"""

from collections.abc import Iterable
from operator import attrgetter

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

MOST = 1e15  # of any number in a row: bytes, seconds, tokens; sums over all rows stay exact enough, and finite
_OPTIONAL = (
    "kept_fraction", "n_context_tokens", "n_answer_tokens", "resident_bytes", "dense_bytes", "prefill_seconds",
    "score_seconds", "evict_seconds", "answer_seconds",
)  # fmt: skip
_BOUNDS: dict[str, tuple[float, float]] = {
    "score": (-MOST, MOST),
    "compression_ratio": (0, 1),
    "seed": (-(2**64), 2**64),
    **dict.fromkeys(_OPTIONAL, (0, MOST)),
}
_values_of = attrgetter(*_BOUNDS)  # all at once: a table of 70000 rows asks for them a dozen times


def check_row(row: Row) -> None:
    """Refuses a row that no table can be made of.

    Raises:
        InvalidArgumentError: The ratio is not in [0, 1], the score or the seed has no bounds, or another figure is not
            in [0, 1e15]. The message names the row and the field.
    """
    for value, (name, (least, most)) in zip(_values_of(row), _BOUNDS.items(), strict=True):
        if value is not None and not least <= value <= most:
            raise InvalidArgumentError(_beyond(row, name, value, least, most))


def check_heads(heads: Iterable[HeadBudgets]) -> None:
    """Refuses head budgets that no map can be made of.

    Raises:
        InvalidArgumentError: A fraction is not in [0, 1], or there are more or fewer layers than named.
    """
    for budgets in heads:
        budgets.check()


def _beyond(row: Row, name: str, value: float, least: float, most: float) -> str:
    where = f"{row.task!s:.40}/{row.sample_id!s:.40}/{row.question_id!s:.40} of {row.press!s:.40}"
    got = f"an integer of {value.bit_length()} bits" if isinstance(value, int) and value > MOST else f"{value!r:.80}"
    return f"expected {name} of the row {where} to be in [{least:g}, {most:g}], got {got}"
