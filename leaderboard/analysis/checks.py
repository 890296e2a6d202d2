"""Refuses rows whose values are of another kind or beyond all measure, before anything is computed of them."""

from collections.abc import Iterable

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

MOST = 1e15  # of any number in a row: bytes, seconds, tokens; sums over all rows stay exact enough, and finite
_TEXTS = ("run_id", "task", "model", "press", "sample_id", "question_id", "prediction")
_OPTIONAL = (
    "kept_fraction", "n_context_tokens", "n_answer_tokens", "resident_bytes", "dense_bytes", "prefill_seconds",
    "score_seconds", "evict_seconds", "answer_seconds",
)  # fmt: skip


def check_row(row: Row) -> None:
    """Refuses a row that no table can be made of.

    Raises:
        InvalidArgumentError: A name or text is no text; a ratio is no number in [0, 1], or a score no number; another
            figure is neither None nor a number in [0, 1e15]; tags or provenance are no mappings of names. The message
            names the row and the field.
    """
    for name in _TEXTS:
        _check(row, name, isinstance(getattr(row, name), str), "a text")
    _check(row, "score", _is_number(row.score, least=-MOST), f"a number of at most {MOST:g}")
    _check(row, "compression_ratio", _is_number(row.compression_ratio, most=1), "a number in [0, 1]")
    for name in _OPTIONAL:
        value = getattr(row, name)
        _check(row, name, value is None or _is_number(value), f"a number in [0, {MOST:g}]")
    _check(row, "seed", isinstance(row.seed, int) and abs(row.seed) < 2**64, "an integer of at most 64 bits")
    _check(row, "references", all(isinstance(one, str) for one in row.references), "texts")
    _check(row, "tags", _has_names(row.tags), "a mapping with names")
    named = _has_names(row.provenance) and all(isinstance(value, str) for value in row.provenance.values())
    _check(row, "provenance", named, "a mapping of names to texts")


def check_heads(heads: Iterable[HeadBudgets]) -> None:
    """Refuses head budgets that no map can be made of.

    Raises:
        InvalidArgumentError: A fraction is no number in [0, 1], or there are more or fewer layers than named.
    """
    for budgets in heads:
        if not all(_is_number(part, most=1) for layer in budgets.kept for part in layer):
            raise InvalidArgumentError(f"expected the heads of {budgets.key} to keep fractions in [0, 1], got others")
        if len(budgets.kept) != len(budgets.layer_idx):
            raise InvalidArgumentError(
                f"expected {budgets.key} to have {len(budgets.layer_idx)} layers, got {len(budgets.kept)}"
            )


def _check(row: Row, name: str, fits: bool, expected: str) -> None:
    if not fits:
        where = f"{row.task!s:.40}/{row.sample_id!s:.40}/{row.question_id!s:.40} of {row.press!s:.40}"
        raise InvalidArgumentError(f"expected {name} of the row {where} to be {expected}, got {_shown(row, name)}")


def _shown(row: Row, name: str) -> str:
    value = getattr(row, name)
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) and value > MOST else f"{value!r:.80}"


def _is_number(value: object, *, least: float = 0, most: float = MOST) -> bool:
    """Returns whether it is a number in that range; NaN is in none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _has_names(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)
