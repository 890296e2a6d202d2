"""Times differ where the cells are further apart than the contexts of one cell."""

from collections.abc import Callable

import numpy as np
import pytest

from kvzip_press.leaderboard.analysis.times import times
from kvzip_press.leaderboard.rows.results import Row

MakeRow = Callable[..., Row]


@pytest.fixture
def make_rows(make_row: MakeRow) -> Callable[..., list[Row]]:
    """Rows of six cells; a context takes a time of its own, a cell its factor of it, and each answer some noise."""

    def make(slowest: float, noise: float, n_contexts: int = 40) -> list[Row]:
        rng = np.random.default_rng(0)
        factors = np.geomspace(1, slowest, 6)
        return [
            make_row(press=f"press {cell}", sample_id=str(context), n_answer_tokens=4,
                     answer_seconds=float(factor * (1 + context) * np.exp(noise * rng.standard_normal())))
            for context in range(n_contexts)
            for cell, factor in enumerate(factors)
        ]  # fmt: skip

    return make


@pytest.mark.parametrize(("slowest", "noise", "differ"), [(1.5, 0.05, True), (1.2, 0.1, False), (1.0, 0.1, False)])
def test_times_differ_beyond_their_spread(
    slowest: float, noise: float, differ: bool, make_rows: Callable[..., list[Row]]
) -> None:
    found = times(make_rows(slowest, noise))
    assert found is not None
    assert found.differ is differ
    assert found.apart == pytest.approx(slowest, abs=0.07)
    assert found.spread == pytest.approx(np.exp(2 * 1.645 * noise), rel=0.1)  # the middle 90 % of a normal distribution


def test_what_was_not_timed_is_left_out(make_row: MakeRow, make_rows: Callable[..., list[Row]]) -> None:
    rows = make_rows(2.0, 0.0, 3)
    untimed = [make_row(press="imported", sample_id=str(i), answer_seconds=None) for i in range(3)]
    assert times(rows + untimed) == times(rows) and times(rows).differ  # type: ignore[union-attr]
    assert times([]) is times(untimed) is times(rows[:1]) is times(rows[:6]) is None  # no cell, or one context
    assert times([row for row in rows if row.press == "press 0"]) is None
