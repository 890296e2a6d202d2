"""Cells are means over contexts; table and picture take none, one or many of them."""

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.analysis.summary import Cell, split_tables, summarise, summarise_tasks
from kvzip_press.leaderboard.analysis.table import results_table
from kvzip_press.leaderboard.pictures import save_pareto
from kvzip_press.leaderboard.rows.results import Row

MakeRow = Callable[..., Row]


def drawn(cells: list[Cell], width: int = 100, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(results_table(cells, **options))
    return console.file.getvalue()  # type: ignore[attr-defined]


def text_of(cells: list[Cell], width: int = 100) -> str:
    return drawn(cells, width, title="a title")


def many(make_row: MakeRow) -> list[Row]:
    cells = [("full cache", 0.0)] + [(f"press {i}", ratio) for i in range(8) for ratio in (0.5, 0.7, 0.9)]
    return [
        make_row(press=press, compression_ratio=ratio, kept_fraction=1 - ratio, sample_id=str(i), score=(i % 3) / 2)
        for press, ratio in cells
        for i in range(6)
    ]


def test_accuracy_is_a_mean_over_tasks_of_contexts_of_questions(make_row: MakeRow) -> None:
    rows = [make_row(sample_id="0", question_id=str(i), score=s) for i, s in enumerate([1.0, 1.0, 1.0, 0.0])]
    rows += [make_row(sample_id="1", score=0.25)]
    rows += [make_row(task="other", sample_id=str(i), score=1.0) for i in range(2)]
    (cell,) = summarise(rows)
    assert cell.accuracy == pytest.approx((0.5 + 1.0) / 2)  # (0.75 + 0.25) / 2 and 1
    assert cell.standard_error == pytest.approx(math.sqrt((0.125 / 2 + 0) / 4))
    assert cell.n_questions == 7


def test_a_single_context_has_no_standard_error(make_row: MakeRow) -> None:
    (cell,) = summarise([make_row(question_id=str(i), score=i % 2) for i in range(10)])
    assert cell.standard_error is None
    assert "±" not in text_of([cell])


def test_times_count_each_context_once(make_row: MakeRow) -> None:
    rows = [make_row(sample_id="0", question_id=str(i), prefill_seconds=1.0, score_seconds=1.0) for i in range(9)]
    rows.append(make_row(sample_id="1", prefill_seconds=3.0, score_seconds=5.0))
    (cell,) = summarise(rows)
    assert cell.prefill_seconds == pytest.approx(2.0)
    assert cell.compress_seconds == pytest.approx(3.25)


def test_cells_keep_the_order_of_presses_and_sort_ratios(make_row: MakeRow) -> None:
    order = [("b", 0.9), ("a", 0.5), ("b", 0.5), ("a", 0.9)]
    cells = summarise([make_row(press=press, compression_ratio=ratio) for press, ratio in order])
    assert [(cell.press, cell.compression_ratio) for cell in cells] == [("b", 0.5), ("b", 0.9), ("a", 0.5), ("a", 0.9)]


def test_rows_of_two_runs_are_not_mixed(make_row: MakeRow) -> None:
    with pytest.raises(InvalidArgumentError, match="one run, got 2"):
        summarise([make_row(), make_row(run_id="another")])


def test_query_aware_rows_other_models_and_repeated_rows_are_not_mixed(make_row: MakeRow) -> None:
    for change in ({"query_aware": True}, {"model": "another"}):
        with pytest.raises(InvalidArgumentError, match="one model, all query-aware or none"):
            summarise([make_row(), make_row(**change, sample_id="1")])
    with pytest.raises(InvalidArgumentError, match="one row a press, ratio and question"):
        summarise([make_row(), make_row(prediction="again")])


def test_tables_are_split_by_run_model_and_knowledge_of_the_question(make_row: MakeRow) -> None:
    changes = ({}, {"query_aware": True}, {"run_id": "another"}, {"model": "another"})
    rows = [make_row(sample_id=str(i), **change) for i in range(2) for change in changes]
    tables = split_tables(rows)
    assert [len(table) for table in tables] == [2, 2, 2, 2]
    assert sorted(map(repr, rows)) == sorted(repr(row) for table in tables for row in table)


def test_each_task_has_its_own_cells(make_row: MakeRow) -> None:
    rows = [make_row(task=task, press=press, score=score) for task, press, score in (
        ("a", "x", 1.0), ("a", "y", 0.5), ("b", "x", 0.0))]  # fmt: skip
    found = [(cell.task, cell.press, cell.accuracy) for cell in summarise_tasks(rows)]
    assert found == [("a", "x", 1.0), ("a", "y", 0.5), ("b", "x", 0.0)]
    assert [(cell.task, cell.accuracy) for cell in summarise(rows)] == [(None, 0.5), (None, 0.5)]


def test_time_a_token_is_all_time_over_all_tokens(make_row: MakeRow) -> None:
    known = [
        (1.0, 4),
        (1.0, 0),
        (None, 9),
        (2.0, None),
    ]  # an empty answer took time; what is not known counts neither way
    (cell,) = summarise(
        make_row(question_id=str(i), answer_seconds=seconds, n_answer_tokens=tokens)
        for i, (seconds, tokens) in enumerate(known)
    )
    assert cell.ms_per_token == pytest.approx(500.0)


def test_what_no_row_says_is_none_and_what_some_say_is_their_mean(make_row: MakeRow) -> None:
    names = ("kept_fraction", "resident_bytes", "prefill_seconds", "answer_seconds")
    (cell,) = summarise([make_row(**dict.fromkeys(names), score_seconds=None, n_answer_tokens=None)])
    assert [getattr(cell, name) for name in (*names, "compress_seconds", "ms_per_token")] == [None] * 6
    (cell,) = summarise([make_row(prefill_seconds=None), make_row(sample_id="1", prefill_seconds=3.0)])
    assert cell.prefill_seconds == 3.0


def test_the_table_shows_every_cell_and_says_when_there_is_none(make_row: MakeRow) -> None:
    assert summarise([]) == []
    assert "no rows" in text_of([])
    one = text_of(summarise([make_row()]))
    for figure in ("KVzip", "0.70", "1.00", "0.33", "7.0", "1.50", "2.25", "0.20", "a title"):
        assert figure in one
    text = text_of(summarise(many(make_row)))
    assert sum("0.90" in line for line in text.splitlines()) == 8
    assert "press 7" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_figures_are_whole_on_a_narrow_terminal(make_row: MakeRow, width: int) -> None:
    rows = [make_row(press="AdaKV (ExpectedAttention)", sample_id=str(i), score=i) for i in range(2)]
    assert "0.50 ± 0.50" in text_of(summarise(rows), width)


@pytest.mark.parametrize("amount", ["none", "one", "many"])
def test_the_picture_is_a_png_whatever_the_number_of_rows(tmp_path: Path, make_row: MakeRow, amount: str) -> None:
    pytest.importorskip("matplotlib")
    rows = {"none": [], "one": [make_row()], "many": many(make_row)}[amount]
    path = tmp_path / "new" / "pareto.png"
    save_pareto(summarise(rows), path, "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_without_matplotlib_the_picture_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_row: MakeRow
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        save_pareto(summarise([make_row()]), tmp_path / "pareto.png")


def test_marks_stand_behind_the_figures_and_are_explained(make_row: MakeRow) -> None:
    cells = summarise([make_row(press="A", compression_ratio=0.5), make_row(press="B", compression_ratio=0.5)])
    text = drawn(cells, marks={("A", 0.5): "†‡", ("B", 0.5): ""})
    assert len([line for line in text.splitlines() if "0.50" in line and "†‡" in line]) == 1
    assert "† less accurate than the full cache" in text
    assert "†" not in text_of(cells)


def test_no_figure_is_cut_off_at_80_columns(make_row: MakeRow) -> None:
    figures = {"prefill_seconds": 102.84, "score_seconds": 100.0, "evict_seconds": 2.16, "answer_seconds": 10.13}
    rows = [make_row(press="AdaKV (ExpectedAttention)", sample_id=str(i), score=i / 3, **figures) for i in range(3)]
    (cell,) = summarise(rows)
    text = drawn([cell], width=80, marks={(cell.press, cell.compression_ratio): "†"})
    assert max(map(len, text.splitlines())) <= 80
    for figure in (f"{cell.accuracy:.2f} ± {cell.standard_error:.2f} †", *("102.84", "102.16", "10.13")):
        assert figure in text, figure


def test_rows_of_two_versions_of_a_task_make_no_table(make_row: Callable[..., Row]) -> None:
    rows = [make_row(), make_row(question_id="other", task="niah", task_version=2)]
    assert len(summarise(rows)) == 1
    for version, said in ((2, "1 and 2"), (None, "1 and unknown")):
        with pytest.raises(InvalidArgumentError, match=rf"one version of the task 'hidden_facts', got {said}"):
            summarise([*rows, make_row(question_id="third", task_version=version)])


def test_rows_that_follow_the_full_cache_are_a_table_of_their_own(make_row: MakeRow) -> None:
    """With the divergence, the mean over tasks; rows that were written without a context show milliseconds."""
    written = [make_row(task="a", prefill_seconds=0.0, answer_seconds=0.5, n_answer_tokens=10)]
    following = [
        make_row(task=task, sample_id=str(i), answer_seconds=None, prefill_seconds=0.0, score=0.5, tags={"kl_nats": kl})
        for task, i, kl in (("b", 0, 0.1), ("b", 1, 0.3), ("c", 0, 0.6))
    ]
    assert split_tables([*following, *written]) == [following, written]
    with pytest.raises(InvalidArgumentError, match="all or none following the full cache"):
        summarise([*following, *written])
    (cell,) = summarise(following)
    assert (cell.kl, cell.accuracy, cell.ms_per_token) == (pytest.approx(0.4), 0.5, None)
    assert summarise(written)[0].kl is None
    shown, of_written = drawn([cell]), drawn(summarise(written))
    assert "KL" in shown and "0.400" in shown and "same" in shown and "prefill" not in shown.split("Means")[0]
    assert "ms a" in of_written and "50.0" in of_written and "prefill" not in of_written.split("Means")[0]
    assert "ms a" not in drawn(summarise([make_row()]))


def test_a_divergence_just_below_0_is_shown_as_0(make_row: MakeRow) -> None:
    """Rounding takes the mean of 0 and 0 below it; a table that says -0.000 asks to be explained."""
    (cell,) = summarise([make_row(prefill_seconds=0.0, tags={"kl_nats": -1e-7})])
    shown = drawn([cell]).split("Means")[0]
    assert "0.000" in shown and "-0.000" not in shown
