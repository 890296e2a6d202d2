"""The references are found among the labels, and marks say what is significant."""

from collections.abc import Callable

import pytest

pytest.importorskip("scipy")

from kvzip_press.leaderboard.analysis.references import find_kvzip, judge
from kvzip_press.leaderboard.analysis.summary import find_full
from kvzip_press.leaderboard.rows.results import Row

MakeRow = Callable[..., Row]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["random", "KVzip (local replay)", "KVzip"], "KVzip"),
        (["kvzip"], "kvzip"),
        (["Fast KVzip (gated)", "KVzip-head", "KVzip (full replay)", "KVzip (local replay)"], "KVzip (full replay)"),
        (["Fast KVzip (gated)", "KVzip-head", "kvzip_head"], None),
        ([], None),
    ],
)
def test_kvzip_is_found_by_its_label(labels: list[str], expected: str | None, make_row: MakeRow) -> None:
    assert find_kvzip(make_row(press=label) for label in labels) == expected


def test_the_full_cache_is_the_press_that_removes_nothing(make_row: MakeRow) -> None:
    rows = [make_row(press="KVzip", compression_ratio=ratio) for ratio in (0.0, 0.5)]
    assert find_full(rows) is None
    assert find_full([*rows, make_row(press="none", compression_ratio=0.0)]) == "none"


def test_marks_say_which_cells_differ_significantly(make_row: MakeRow) -> None:
    rows = []
    for press, ratio, score in (("none", 0.0, 1.0), ("KVzip", 0.5, 0.9), ("good", 0.5, 1.0), ("random", 0.5, 0.0)):
        rows += [
            make_row(press=press, compression_ratio=ratio, sample_id=str(i), score=score - 0.01 * i / 12)
            for i in range(12)
        ]
    judgement = judge(rows)
    assert (judgement.full, judgement.kvzip) == ("none", "KVzip")
    assert judgement.marks("KVzip", 0.5) == "†"
    assert judgement.marks("good", 0.5) == "§"
    assert judgement.marks("random", 0.5) == "†‡"
    assert judgement.marks("none", 0.0) == judgement.marks("never seen", 0.1) == ""


def test_without_references_nothing_is_marked(make_row: MakeRow) -> None:
    judgement = judge([make_row(press="random", sample_id=str(i)) for i in range(3)])
    assert (judgement.full, judgement.kvzip, judgement.marks("random", 0.7)) == (None, None, "")
    assert judge([]).against_full == {}
