"""What many questions about a context cost: from the rows' times, by hand."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.ratios import ratio_text
from kvzip_press.leaderboard.analysis.reuse import reuse_lines, reuses
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.analysis.table import results_table
from kvzip_press.leaderboard.analysis.written_table import written
from kvzip_press.leaderboard.run_files import store


def times(prefill: float, score: float, evict: float, answer: float | None) -> dict[str, float | None]:
    return {"prefill_seconds": prefill, "score_seconds": score, "evict_seconds": evict, "answer_seconds": answer}


def cell(make_row, press: str, ratio: float, seconds, samples=("0", "1")) -> list:
    return [make_row(press=press, compression_ratio=ratio, sample_id=one, **seconds) for one in samples]


@pytest.fixture
def rows(make_row) -> list:
    """An answer takes 2 s from the full cache; presses take 4 s once, and 1.5, 0.5 and 2.5 s an answer."""
    return [
        *cell(make_row, "full", 0.0, times(10, 0, 0.25, 2)),
        *cell(make_row, "KVzip", 0.5, times(10, 3, 1, 1.5)),
        *cell(make_row, "KVzip", 0.96875, times(10, 3, 1, 0.5)),
        *cell(make_row, "slow", 0.5, times(10, 3, 1, 2.5)),
    ]


def test_totals_and_where_they_break_even_are_those_of_the_formula(rows) -> None:
    full, half, hard, slow = reuses(rows)
    assert (full.press, half.compression_ratio, hard.compression_ratio) == ("full", 0.5, 0.96875)
    assert [full.total(8), full.full_total(8), full.anew_total(8)] == [26, 26, 96]
    assert [half.total(1), half.total(8), hard.total(8)] == [15.5, 26, 18]
    assert (half.break_even, hard.break_even, slow.break_even) == (9, 3, None)  # 8 questions only draw level
    assert half.total(9) < half.full_total(9) and half.total(8) == half.full_total(8)
    assert (half.break_even_anew, slow.break_even_anew, full.break_even_anew) == (2, 2, 2)
    assert (full.n_contexts, full.break_even) == (2, None)


def test_contexts_that_only_one_side_has_do_not_count(rows, make_row) -> None:
    """A long context that only a press has read would make it look slow."""
    rows += cell(make_row, "KVzip", 0.5, times(1000, 1000, 1, 100), samples=("2",))
    assert reuses(rows)[1] == reuses(rows[:-1])[1]


def test_rows_without_times_or_a_full_cache_make_no_table(rows, make_row) -> None:
    assert reuses(rows[2:]) == [] and reuses([]) == []
    assert reuses(cell(make_row, "full", 0.0, times(10, 0, 0, None))) == []  # followed, and not answered
    assert reuses(cell(make_row, "full", 0.0, times(0, 0, 0, 1))) == []  # no context
    assert reuse_lines([])[1] == []


def test_the_table_has_each_way_and_each_number_of_questions(rows) -> None:
    head, lines = reuse_lines(reuses(rows), (1, 8))
    titles = ["seconds in all", "removed", "once", "a question", "1 question", "8 questions"]
    titles += ["beats full cache from", "beats reading anew from"]
    assert head == titles
    assert written(head, lines, "markdown").splitlines()[1:] == [
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| no cache kept | 0.00 | 0 | 12 | 12 | 96 | - | - |",
        "| full | 0.00 | 10 | 2 | 12 | 26 | - | 2 |",
        "| KVzip | 0.50 | 14 | 1.5 | 15.5 | 26 | 9 | 2 |",
        "| KVzip | 0.96875 | 14 | 0.5 | 14.5 | 18 | 3 | 2 |",
        "| slow | 0.50 | 14 | 2.5 | 16.5 | 34 | never | 2 |",
    ]
    latex = written(head, lines, "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{lrrrrrrr}" and latex[5] == r"full & 0.00 & 10 & 2 & 12 & 26 & - & 2 \\"
    for wrong in ((), (0, 1), (8, 8), (8, 1)):
        with pytest.raises(InvalidArgumentError, match="rising numbers of questions from 1 on"):
            reuse_lines(reuses(rows), wrong)


def test_ratios_are_told_apart_in_tables(make_row) -> None:
    """32:1 removes 0.96875, which two decimals would call 0.97."""
    assert [ratio_text(one) for one in (0.0, 0.5, 0.875, 0.9375, 0.94, 0.96875, 0.97, 0.9688)] == [
        "0.00", "0.50", "0.875", "0.9375", "0.94", "0.96875", "0.97", "0.9688",
    ]  # fmt: skip
    cells = summarise([row for ratio in (0.96875, 0.97) for row in cell(make_row, "KVzip", ratio, {})])
    assert list(results_table(cells).columns[1].cells) == ["0.96875", "0.97"]


def test_the_command_prints_it_in_each_form(rows, make_row, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    store(rows, tmp_path / "run")
    shown = command(tmp_path / "run", "--format", "markdown", "--questions", "1,8").output.splitlines()
    assert shown[4] == "| KVzip | 0.50 | 14 | 1.5 | 15.5 | 26 | 9 | 2 |"
    assert "begin{tabular}" in command(tmp_path / "run", "--format", "latex").output
    assert "512" in command(tmp_path / "run").output and "never" in command(tmp_path / "run").output
    store([make_row(answer_seconds=None)], tmp_path / "untimed")
    for folder, options, message in (
        ("run", ["--questions", "1,x"], "rising numbers of questions from 1 on"),
        ("run", ["--format", "html"], "a form out of latex, markdown, terminal"),
        ("untimed", [], "rows with times, of contexts and of a full cache"),
    ):
        assert message in str(command(tmp_path / folder, *options).exception)


def command(*arguments: object):
    return CliRunner().invoke(app, ["leaderboard", "reuse", *map(str, arguments)])
