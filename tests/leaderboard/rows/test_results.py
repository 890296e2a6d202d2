"""Rows go to the disk one by one, come back equal, and a torn last line costs that line only."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.rows.results import Row, RowWriter, read_rows, run_id

MakeRow = Callable[..., Row]


def test_rows_come_back_equal_and_in_order(tmp_path: Path, make_row: MakeRow) -> None:
    rows = [make_row(question_id=f"q{i}", prediction='“é”\n\t"x"  ', score=i / 7) for i in range(5)]
    with RowWriter(tmp_path / "new" / "rows.jsonl") as writer:
        for row in rows:
            writer.write(row)
    assert list(read_rows(tmp_path / "new" / "rows.jsonl")) == rows


def test_each_row_is_on_the_disk_when_write_returns(tmp_path: Path, make_row: MakeRow) -> None:
    with RowWriter(tmp_path / "rows.jsonl") as writer:
        for n in range(1, 4):
            writer.write(make_row())
            assert len(list(read_rows(tmp_path / "rows.jsonl"))) == n


def test_a_second_writer_appends(tmp_path: Path, make_row: MakeRow) -> None:
    for name in ("first", "second"):
        with RowWriter(tmp_path / "rows.jsonl") as writer:
            writer.write(make_row(question_id=name))
    assert [row.question_id for row in read_rows(tmp_path / "rows.jsonl")] == ["first", "second"]


@pytest.mark.parametrize("left", [1, 20, 200])
def test_a_torn_last_line_is_left_out_and_cut_off_with_a_note(
    tmp_path: Path, make_row: MakeRow, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    path = tmp_path / "rows.jsonl"
    line = make_row(question_id="whole").to_json() + "\n"
    path.write_text(line + line[:left], encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert [row.question_id for row in read_rows(path)] == ["whole"]
        with RowWriter(path) as writer:
            writer.write(make_row(question_id="after"))
    assert "half a row" in caplog.text
    assert f"{left} bytes" in caplog.text
    assert [row.question_id for row in read_rows(path)] == ["whole", "after"]


def test_a_torn_first_line_leaves_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"run_id": "x', encoding="utf-8")
    assert list(read_rows(path)) == []
    with RowWriter(path):
        pass
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", ["{", "[]", '{"run_id": "x"}', "null", '{"references": 3}'])
def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path: Path, make_row: MakeRow, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{make_row().to_json()}\n{line}\n{make_row().to_json()}\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"rows\.jsonl:2: expected a row"):
        list(read_rows(path))


def test_fields_of_a_newer_version_are_left_out(make_row: MakeRow) -> None:
    line = make_row().to_json()
    assert Row.from_json(line[:-1] + ', "added_later": 1}') == make_row()


def test_run_ids_depend_on_the_configuration_and_not_on_its_order() -> None:
    assert run_id({"a": 1, "b": [2, 3]}) == run_id({"b": [2, 3], "a": 1})
    assert run_id({"a": 1}) != run_id({"a": 2})
    assert len(run_id({})) == 12
