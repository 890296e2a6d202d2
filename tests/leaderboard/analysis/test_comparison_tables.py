"""What a run says of its presses, in tables of text: whose rows are in which, in what order, against what."""

from __future__ import annotations

import itertools

import pytest
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.comparison_tables import comparison_tables, press_table
from kvzip_press.leaderboard.analysis.statistics import compare
from kvzip_press.leaderboard.run_files import store

MADE, READ = {"data_revision": "generated"}, {"data_revision": "a package 1.0, sha256 00"}


def answers(make_row, press, ratio, score, tasks=("one", "two"), n_contexts=8, **values):
    """Rows of a press: a question about each context, the last of which are answered, `score` of all."""
    sizes = {"kept_fraction": 1 - ratio, "resident_bytes": round(1e7 * (1 - ratio))}
    return [
        make_row(
            press=press, compression_ratio=ratio, task=task, sample_id=f"{i:04d}", score=score_of, **sizes, **values
        )
        for task in tasks
        for i in range(n_contexts)
        for score_of in [float(i >= n_contexts * (1 - score))]
    ]


@pytest.fixture
def rows(make_row) -> list:
    """Two tasks that count, one made and one read, and a third that the full cache cannot do."""
    presses = [("full cache", 0.0, 0.875), ("worse", 0.5, 0.25), ("worse", 0.75, 0.125), ("random", 0.5, 0.0)]
    presses += [("kvzip", 0.5, 0.75), ("kvzip", 0.75, 0.5), ("random", 0.75, 0.0)]
    made = itertools.chain(*(answers(make_row, *press, tasks=["one"], provenance=MADE) for press in presses))
    read = itertools.chain(*(answers(make_row, *press, tasks=["two"], provenance=READ) for press in presses))
    hard = answers(make_row, "full cache", 0.0, 0.0, tasks=["hard"], provenance=MADE)
    return [*made, *read, *hard, *answers(make_row, "kvzip", 0.5, 1.0, tasks=["hard"], provenance=MADE)]


def by_title(rows, reference=None):
    return {table.title: table for table in comparison_tables(rows, reference)}


def test_tasks_that_do_not_count_are_in_no_other_table(rows) -> None:
    tables = by_title(rows)
    assert [(line[0], line[4], line[6]) for line in tables["Which tasks count"].rows] == [
        ("one", "0.875 ± 0.125", "yes"),
        ("two", "0.875 ± 0.125", "yes"),
        ("hard", "0.000 ± 0.000", "no"),
    ]
    assert tables["Which tasks count"].note.endswith("hard: the full cache is not clearly above the floor.")
    assert tables["Accuracy, tasks that count"].note.startswith("2 tasks, 16 contexts, 16 questions.")
    kvzip = next(line for line in tables["Accuracy, tasks that count"].rows if line[0] == "kvzip")
    assert kvzip[1].startswith("0.750 ±")  # 1.0 in the task that does not count would raise it


def test_presses_stand_in_the_order_of_their_areas_behind_the_full_cache(rows) -> None:
    lines = by_title(rows)["Accuracy, tasks that count"].rows
    assert [line[0] for line in lines] == ["full cache", "kvzip", "worse", "random"]
    assert [float(line[-1]) for line in lines[1:]] == sorted((float(line[-1]) for line in lines[1:]), reverse=True)


def test_differences_are_those_of_compare(rows) -> None:
    tables = by_title(rows)
    counted = [row for row in rows if row.task != "hard"]
    for reference in ("kvzip", "full cache"):
        table = tables[f"Minus {reference}, tasks that count"]
        found = {(one.press, one.compression_ratio): one for one in compare(counted, reference)}
        assert f"the comparisons of the table, {len(found)} in number" in table.note
        assert [line[0] for line in table.rows] == [p for p in ("kvzip", "worse", "random") if p != reference]
        for press, *figures in table.rows:
            for ratio, figure in zip((0.5, 0.75), figures, strict=False):
                one = found[press, ratio]
                assert figure.startswith(f"{one.difference:+.3f} (") and figure.endswith("*") == one.is_significant
    assert tables["Minus kvzip, tasks that count"].rows[1][:2] == ["random", "-0.750 (<0.001)*"]


def test_generated_and_existing_text_have_tables_of_their_own(rows, make_row) -> None:
    tables = by_title(rows)
    assert tables["Accuracy, generated text"].note.startswith("1 task, 8 contexts, 8 questions.")
    assert tables["Accuracy, existing text"].note.startswith("1 task, 8 contexts, 8 questions.")
    assert not any("text" in title for title in by_title([row for row in rows if row.task == "one"]))
    unknown = [row for row in rows if row.task == "one"] + answers(make_row, "kvzip", 0.5, 0.5, tasks=["two"])
    assert not any("text" in title for title in by_title(unknown))  # rows that do not know are in neither


def test_storages_stand_beside_the_press_that_they_are_of(rows, make_row) -> None:
    for press, ratio, score in (("full cache", 0.0, 0.75), ("kvzip", 0.5, 0.5)):
        rows += answers(make_row, f"{press}, int8", ratio, score, storage="int8", provenance=MADE)
    tables = by_title(rows)
    table = tables["Storages, tasks that count"]
    assert list(table.head) == ["storage, removed", "0", "0.5", "0.75", "area over bytes"]
    found = {line[0]: line[1:4] for line in table.rows}
    assert list(found) == ["full cache", "full cache, int8", "kvzip", "kvzip, int8"]
    assert found["full cache"] == ["0.875, 10.0 MB", "-", "-"]
    assert found["full cache, int8"][0].startswith("0.750, 10.0 MB (-0.125, p ")
    assert found["kvzip, int8"][1].startswith("0.500, 5.0 MB (-0.250, p ") and found["kvzip, int8"][2] == "-"
    for other in ("Accuracy", "Minus kvzip"):
        assert not any("int8" in line[0] for line in tables[f"{other}, tasks that count"].rows)
    assert not any("int8" in line[0] for line in tables["What was kept"].rows)


def test_a_press_that_was_run_in_one_storage_alone_is_compared_as_it_is(rows, make_row) -> None:
    rows += answers(make_row, "gated, int8", 0.5, 0.5, storage="int8", provenance=MADE)
    tables = by_title(rows)
    assert "gated, int8" in [line[0] for line in tables["Accuracy, tasks that count"].rows]
    assert "Storages, tasks that count" not in tables


def test_rows_that_follow_the_full_cache_are_not_compared_with_it(make_row) -> None:
    presses = [("full cache", 0.0, 1.0), ("kvzip", 0.5, 0.75), ("random", 0.5, 0.25)]
    rows = [row for one in presses for row in answers(make_row, *one, tags={"kl_nats": 0.25})]
    tables = by_title(rows)
    assert list(tables) == ["Agreement with the full cache, all tasks", "Minus kvzip, all tasks", "What was kept"]
    assert tables["Agreement with the full cache, all tasks"].rows[1][1].endswith(", 0.250")


def test_one_press_is_compared_with_intervals_and_task_by_task(rows) -> None:
    table = press_table(rows, "worse")
    assert table.title == "worse minus kvzip"
    assert [line[0] for line in table.rows] == [
        "tasks that count", "generated text", "existing text", "one", "two", "detectable, tasks that count",
    ]  # fmt: skip
    assert table.rows[0][1].startswith("-0.500 (-0.") and table.rows[0][1].endswith(", p 0.01")
    assert press_table(rows, "kvzip", "full cache").title == "kvzip minus full cache"
    without = [row for row in rows if row.press != "kvzip"]
    assert press_table(without, "worse").title == "worse minus full cache"


def test_labels_that_no_row_has_are_refused(rows) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected a press of these rows out of .*, got 'kvzap'.*kvzip"):
        comparison_tables(rows, "kvzap")
    with pytest.raises(InvalidArgumentError, match="expected a press of these rows"):
        press_table(rows, "kvzap")
    said = r"expected a reference other than 'kvzip', got 'kvzip': give another \(--reference\), such as 'full cache'"
    with pytest.raises(InvalidArgumentError, match=said):
        press_table(rows, "kvzip")


def test_the_command_prints_the_tables_in_each_form(rows, make_row, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows += answers(make_row, "kvzip", 0.5, 0.5, tags={"kl_nats": 0.25})
    store(rows, tmp_path / "run")
    markdown = command(tmp_path / "run", "--format", "markdown").output
    model = rows[0].model
    assert f"## {model}, query-agnostic, answers: Which tasks count\n\n| task | tokens |" in markdown
    assert f"## {model}, query-agnostic, agreement: Agreement with the full cache, all tasks\n" in markdown
    latex = command(tmp_path / "run", "--format", "latex", "--press", "worse").output.splitlines()
    assert latex[0].endswith("worse minus kvzip") and latex[0][:2] == "% " and latex[1].startswith(r"\begin{tabular}")
    assert latex[-1].startswith("% Differences")
    assert "agreement" not in "".join(latex)  # which has no such press
    shown = command(tmp_path / "run", "--reference", "worse").output
    assert "minus worse" in shown and "minus full cache" in shown and "minus kvzip" not in shown
    for options, message in (
        (["--press", "kvzap"], "a press of this run out of full cache, kvzip"),
        (["--reference", "x"], "a press of this run"),
        (["--format", "html"], "a form out of latex, markdown, terminal"),
    ):
        assert message in str(command(tmp_path / "run", *options).exception)


def command(*arguments: object):
    return CliRunner().invoke(app, ["leaderboard", "compare", *map(str, arguments)])
