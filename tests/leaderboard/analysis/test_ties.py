"""A ratio at which nothing tells the presses apart is named, and told from one with too few contexts to tell."""

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("scipy")

from kvzip_press.leaderboard.analysis.ties import ties
from kvzip_press.leaderboard.rows.results import Row

MakeRow = Callable[..., Row]
Scores = dict[str, list[float]]


@pytest.fixture
def make_rows(make_row: MakeRow) -> Callable[..., list[Row]]:
    """Rows of one ratio: a score for each press and context."""

    def make(scores: Scores, ratio: float = 0.9) -> list[Row]:
        return [
            make_row(press=press, compression_ratio=ratio, sample_id=str(context), score=score)
            for press, found in scores.items()
            for context, score in enumerate(found)
        ]

    return make


def test_a_ratio_at_which_all_presses_tie_is_saturated(make_rows: Callable[..., list[Row]]) -> None:
    rng = np.random.default_rng(0)
    lost = {"KVzip": 0.1, "SnapKV": 0.8, "random": 0.9}
    rows = make_rows({"full cache": [1.0] * 12}, 0.0)
    rows += make_rows({press: [1.0 - 0.01 * float(rng.random() > 0.5) for _ in range(12)] for press in lost}, 0.1)
    rows += make_rows({press: [1.0 - part] * 12 for press, part in lost.items()}, 0.9)
    rows += make_rows({"KVzip": [1.0] * 12}, 0.3)  # alone: nothing to be told apart
    (tie,) = ties(rows)
    assert (tie.compression_ratio, tie.n_contexts, tie.is_undecidable) == (0.1, 12, False)
    assert 0.99 <= tie.lowest < tie.highest <= 1.0
    assert str(tie).startswith("At 0.1 removed nothing tells the presses apart beyond chance: accuracies from 0.99 to")
    assert ties([]) == []


def test_four_contexts_tell_presses_apart_that_differ_on_each(make_rows: Callable[..., list[Row]]) -> None:
    """Tested pair by pair, no four contexts could: the least p-value was 2 / 16, times the number of pairs."""
    scores = {"KVzip": 0.94, "SnapKV": 0.3, "expected": 0.2, "knorm": 0.15, "random": 0.12}
    assert ties(make_rows({press: [score] * 4 for press, score in scores.items()})) == []


def test_too_few_contexts_are_not_called_a_tie(make_rows: Callable[..., list[Row]]) -> None:
    (tie,) = ties(make_rows({"KVzip": [0.94, 0.94], "random": [0.12, 0.12]}))
    assert str(tie) == (
        "At 0.9 removed 2 contexts cannot tell the presses apart: accuracies from 0.12 to 0.94 may be chance. "
        "More contexts could."
    )
    (tie,) = ties(make_rows({"KVzip": [1.0], "random": [0.0]}))
    assert "At 0.9 removed 1 context cannot tell" in str(tie)


def test_equal_scores_are_said_to_be_equal(make_rows: Callable[..., list[Row]]) -> None:
    (tie,) = ties(make_rows({press: [1.0, 0.0, 1.0, 1.0] for press in "ab"}))
    assert str(tie) == ("At 0.9 removed nothing tells the presses apart: all have an accuracy of 0.75 on 4 contexts.")


def test_only_questions_that_all_presses_answered_count(make_rows: Callable[..., list[Row]]) -> None:
    scores = {"a": [1.0] * 8, "b": [0.0] * 8, "c": [1.0, 0.0]}
    (tie,) = ties(make_rows(scores))
    assert tie.n_contexts == 2
    apart = make_rows({"a": [1.0]}) + [row for row in make_rows({"b": [0.0, 0.0]}) if row.sample_id == "1"]
    assert ties(apart) == []  # they share no question, so nothing is known


def test_presses_without_a_difference_are_told_apart_one_time_in_twenty(make_rows: Callable[..., list[Row]]) -> None:
    rng = np.random.default_rng(1)
    n = 60
    found = sum(
        not ties(make_rows({press: rng.random(6).tolist() for press in "abcd"}), seed=i, n_resamples=199)
        for i in range(n)
    )
    assert found <= 8  # of a binomial distribution with p = 0.05, more than 99 %
