"""Comparisons are paired by context, exact where they can be, and the same whatever the order of the rows."""

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy import stats

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.curves import area_under_curve, areas_under_curves, relative_performance
from kvzip_press.leaderboard.analysis.statistics import Comparison, compare, holm
from kvzip_press.leaderboard.analysis.summary import find_full, summarise, summarise_tasks
from kvzip_press.leaderboard.rows.results import Row

MakeRow = Callable[..., Row]


@pytest.fixture
def make_rows(make_row: MakeRow) -> Callable[..., list[Row]]:
    """The rows of one cell: a score a context."""

    def make(scores: Sequence[float], press: str = "KVzip", ratio: float = 0.5, **values: object) -> list[Row]:
        return [
            make_row(
                press=press, compression_ratio=ratio, kept_fraction=1 - ratio, sample_id=str(i), score=score, **values
            )
            for i, score in enumerate(scores)
        ]

    return make


def sign_test(differences: Sequence[float]) -> float:
    """By the definition: all sign patterns, two-sided."""
    sums = [math.fsum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    seen = math.fsum(differences)
    high, low = (np.mean([s >= seen - 1e-12 for s in sums]), np.mean([s <= seen + 1e-12 for s in sums]))
    return float(min(1.0, 2 * min(high, low)))


def only(rows: list[Row], reference: str = "full cache") -> Comparison:
    (comparison,) = compare(rows, reference)
    return comparison


def test_the_p_value_of_few_contexts_is_that_of_all_sign_patterns(make_rows: Callable[..., list[Row]]) -> None:
    full, press = [1, 1, 1, 0.5, 1, 0, 1, 1], [0, 0.5, 1, 0.5, 0.25, 0.5, 0, 0]
    found = only(make_rows(full, "full cache", 0.0) + make_rows(press))
    expected = [p - f for p, f in zip(press, full, strict=True)]
    assert found.difference == pytest.approx(np.mean(expected))
    assert found.p_value == pytest.approx(sign_test(expected))
    assert found.n_contexts == 8


def test_the_interval_is_that_of_scipys_bootstrap(make_rows: Callable[..., list[Row]]) -> None:
    rng = np.random.default_rng(3)
    full, press = rng.random(20).tolist(), rng.random(20).tolist()
    found = only(make_rows(full, "full cache", 0.0) + make_rows(press))
    differences = np.array([p - f for p, f in zip(press, full, strict=True)])[np.argsort([str(i) for i in range(20)])]
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.01)  # batches draw in another order
    assert found.interval is not None and found.interval[0] < found.difference < found.interval[1]


def test_pairing_sees_what_the_spread_between_contexts_hides(make_rows: Callable[..., list[Row]]) -> None:
    full = [i / 20 for i in range(20)]
    rows = make_rows(full, "full cache", 0.0) + make_rows([max(score - 0.05, 0) for score in full])
    cells = summarise(rows)
    assert all(cell.standard_error is not None and cell.standard_error > 0.05 for cell in cells)
    assert only(rows).is_significant


def test_contexts_weigh_as_in_the_accuracy_whatever_the_number_of_their_questions(make_row: MakeRow) -> None:
    rows = []
    for press, ratio, many, few in (("full cache", 0.0, 1.0, 1.0), ("KVzip", 0.5, 1.0, 0.0)):
        of = {"press": press, "compression_ratio": ratio}
        rows += [make_row(sample_id="0", question_id=str(i), score=many, **of) for i in range(9)]
        rows += [make_row(sample_id="1", score=few, **of)]
        rows += [make_row(task="other", sample_id=str(i), score=1.0, **of) for i in range(5)]
    full, press = summarise(rows)
    assert only(rows).difference == pytest.approx(press.accuracy - full.accuracy) == pytest.approx(-0.25)


def test_only_questions_that_both_answered_are_compared(make_rows: Callable[..., list[Row]]) -> None:
    found = only(make_rows([1, 1, 1, 1], "full cache", 0.0) + make_rows([0.5, 1]))
    assert (found.n_contexts, found.difference) == (2, pytest.approx(-0.25))
    assert compare(make_rows([1], "full cache", 0.0) + make_rows([1], task="other"), "full cache") == []


def test_a_reference_with_ratios_is_met_at_the_same_ratio(make_rows: Callable[..., list[Row]]) -> None:
    rows = make_rows([1, 1], "KVzip", 0.5) + make_rows([0, 1], "KVzip", 0.9) + make_rows([0, 1], "random", 0.9)
    rows += make_rows([0, 0], "random", 0.7)
    found = only(rows, "KVzip")
    assert (found.press, found.compression_ratio, found.difference) == ("random", 0.9, 0.0)


def test_ties_and_a_single_context_are_no_difference(make_rows: Callable[..., list[Row]]) -> None:
    tied = only(make_rows([1, 0, 1], "full cache", 0.0) + make_rows([1, 0, 1]))
    assert (tied.difference, tied.interval, tied.p_value, tied.is_significant) == (0.0, (0.0, 0.0), 1.0, False)
    single = only(make_rows([1], "full cache", 0.0) + make_rows([0]))
    assert (single.difference, single.interval, single.p_value) == (-1.0, None, 1.0)


def test_two_contexts_are_never_significant(make_rows: Callable[..., list[Row]]) -> None:
    found = only(make_rows([1, 1], "full cache", 0.0) + make_rows([0, 0]))
    assert found.p_value == pytest.approx(0.5)  # two of the four sign patterns


def test_the_same_rows_in_any_order_and_company_give_the_same_numbers(make_rows: Callable[..., list[Row]]) -> None:
    rng = random.Random(0)
    full = make_rows([rng.random() for _ in range(30)], "full cache", 0.0)
    press, other = (make_rows([rng.random() for _ in range(30)], name) for name in ("KVzip", "random"))
    (alone,) = compare(full + press, "full cache")
    shuffled = [*full, *press, *other]
    rng.shuffle(shuffled)
    (again,) = (one for one in compare(shuffled, "full cache") if one.press == "KVzip")
    assert (again.interval, again.p_value, again.difference) == (alone.interval, alone.p_value, alone.difference)
    assert again.adjusted_p_value >= alone.adjusted_p_value


def test_nine_intervals_of_ten_hold_the_true_difference(make_rows: Callable[..., list[Row]]) -> None:
    rng = np.random.default_rng(0)
    true, held, n = -0.2, 0, 150
    for _ in range(n):
        full = rng.random(40)
        press = full + true + rng.normal(scale=0.3, size=40)
        rows = make_rows(full.tolist(), "full cache", 0.0) + make_rows(press.tolist())
        (found,) = compare(rows, "full cache", n_resamples=499)
        assert found.interval is not None
        held += found.interval[0] <= true <= found.interval[1]
    assert 0.89 <= held / n <= 0.99  # 95 % less the bootstrap's shortfall at 40 contexts, and chance (2 % a side)


def test_without_a_difference_one_test_of_twenty_says_there_is_one(make_rows: Callable[..., list[Row]]) -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((2, 300, 12)).round(1)
    p_values = [
        only(make_rows(full.tolist(), "full cache", 0.0) + make_rows(press.tolist())).p_value
        for full, press in zip(*scores, strict=True)
    ]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_mark_must_survive_the_other_comparisons(make_rows: Callable[..., list[Row]]) -> None:
    full = make_rows([1] * 6, "full cache", 0.0)
    assert only(full + make_rows([0] * 6)).is_significant  # p = 2 / 64
    rows = full + make_rows([0] * 6) + make_rows([1] * 6, "random")
    worse, tied = compare(rows, "full cache")
    assert (worse.p_value, worse.adjusted_p_value) == (pytest.approx(2 / 64), pytest.approx(4 / 64))
    assert not worse.is_significant and tied.adjusted_p_value == 1.0


def test_an_unknown_reference_is_named(make_rows: Callable[..., list[Row]]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\['KVzip'\], got 'none'"):
        compare(make_rows([1, 1]), "none")
    assert compare([], "none") == []


def test_the_area_by_hand() -> None:
    points = [(0.1, 0.2), (0.3, 0.6), (1.0, 1.0)]
    assert area_under_curve(points, 0.1, 1.0) == pytest.approx((0.2 * 0.4 + 0.7 * 0.8) / 0.9)
    assert area_under_curve(points, 0.2, 0.3) == pytest.approx(0.5)  # from 0.4, halfway, to 0.6
    assert area_under_curve(points, 0.05, 1.0) is None
    assert area_under_curve([], 0.0, 1.0) is None
    with pytest.raises(InvalidArgumentError, match="rising places"):
        area_under_curve(points[::-1], 0.1, 1.0)


def test_areas_end_at_the_full_cache_and_begin_where_all_presses_were_measured(
    make_rows: Callable[..., list[Row]],
) -> None:
    rows = make_rows([1.0], "full cache", 0.0)
    for press, scores in (("KVzip", (0.8, 0.6)), ("random", (0.4, 0.0))):
        rows += [
            row for ratio, score in zip((0.5, 0.9), scores, strict=True) for row in make_rows([score], press, ratio)
        ]
    rows += make_rows([0.5], "SnapKV", 0.7)  # measured at one ratio only
    areas = areas_under_curves(summarise(rows))
    assert areas is not None
    assert (areas.low, areas.high) == (pytest.approx(0.1), 1.0)
    assert areas.areas["KVzip"] == pytest.approx((0.4 * 0.7 + 0.5 * 0.9) / 0.9)
    assert areas.areas["random"] == pytest.approx((0.4 * 0.2 + 0.5 * 0.7) / 0.9)
    assert areas.areas["SnapKV"] is None
    assert areas_under_curves([]) is None
    assert areas_under_curves(summarise(make_rows([1.0]))) is None


def test_relative_performance_is_a_mean_of_ratios_over_tasks_that_the_full_cache_can_do(
    make_rows: Callable[..., list[Row]],
) -> None:
    rows = []
    for task, full, press in (("a", 0.8, 0.4), ("b", 0.5, 0.5), ("c", 0.0, 0.2)):
        rows += make_rows([full, full], "full cache", 0.0, task=task) + make_rows([press, press], task=task)
    cells = summarise_tasks(rows)
    assert find_full(cells) == "full cache"
    found = relative_performance(cells)
    assert found == {("full cache", 0.0): 1.0, ("KVzip", 0.5): pytest.approx(0.75)}
    assert relative_performance(cell for cell in cells if cell.press == "KVzip") == {}
