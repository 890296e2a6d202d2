"""A file of lines belongs to one writer, and nothing that a writer did not write is cut off, renamed or removed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.leaderboard.rows import line_file
from kvzip_press.leaderboard.rows.line_file import keep_aside
from kvzip_press.leaderboard.rows.results import Row, RowWriter, read_rows

MakeRow = Callable[..., Row]


def test_what_a_link_leads_to_is_left_as_it_is(tmp_path: Path, make_row: MakeRow) -> None:
    for content in (b"my thesis, in one line", b"", f'{{"run_id": "{"x" * 99}'.encode(), b"whole lines\n"):
        (tmp_path / "thesis.txt").write_bytes(content)
        (tmp_path / "rows.jsonl").symlink_to(tmp_path / "thesis.txt")
        with pytest.raises(RunDirectoryError, match=r"rows\.jsonl to be a file of its own, got a link"):
            RowWriter(tmp_path / "rows.jsonl").__enter__()
        assert (tmp_path / "thesis.txt").read_bytes() == content
        (tmp_path / "rows.jsonl").unlink()


@pytest.mark.parametrize(
    "content", [b"my thesis, in one line", b'[{"a": 1}]', b"one line\nand another", b'{"model": "x"}', b"\x00\xff"]
)
def test_an_end_that_no_row_begins_with_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"expected .* to end with a newline, or with the beginning of a row"):
        RowWriter(tmp_path / "rows.jsonl").__enter__()
    assert (tmp_path / "rows.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    "end", [b"{", b'{"run_', b'{"run_id": "0123', b"\0" * 5000, b'{"run_id": "0"' + b"\0" * 70_000]
)
def test_half_a_row_and_the_zeros_of_a_power_cut_are_cut_off(tmp_path: Path, make_row: MakeRow, end: bytes) -> None:
    whole = f"{make_row().to_line()}\n".encode()
    (tmp_path / "rows.jsonl").write_bytes(whole + end)
    with RowWriter(tmp_path / "rows.jsonl"):
        pass
    assert (tmp_path / "rows.jsonl").read_bytes() == whole


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path, make_row: MakeRow) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "rows.jsonl"
    with RowWriter(path) as writer:
        with pytest.raises(RunDirectoryError, match="another process writes to it"):
            RowWriter(path).__enter__()
        writer.write(make_row())
    with RowWriter(path) as writer:
        writer.write(make_row(question_id="second"))
    assert len(list(read_rows(path))) == 2


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_goes_away_under_its_writer_is_an_error_and_no_row_is_lost_in_silence(
    tmp_path: Path, make_row: MakeRow, how: str
) -> None:
    path = tmp_path / "rows.jsonl"
    with RowWriter(path) as writer:
        writer.write(make_row())
        path.rename(tmp_path / "moved.jsonl")
        if how == "replaced":
            path.write_text("", encoding="utf-8")
        with pytest.raises(RunDirectoryError, match="it was removed or replaced"):
            writer.write(make_row())
    assert len(list(read_rows(tmp_path / "moved.jsonl"))) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_what_is_no_file_is_neither_read_nor_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(RunDirectoryError, match=r"rows\.jsonl"):
        list(read_rows(path))
    if kind != "missing":
        with pytest.raises(RunDirectoryError, match=r"rows\.jsonl"):
            RowWriter(path).__enter__()


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_file, "JSON_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_bytes(b'{"run_id": "' + b"x" * 200_000)
    with pytest.raises(InvalidArgumentError, match="at most 1000 bytes"):
        list(read_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(InvalidArgumentError, match="at most 1000 bytes"):
        RowWriter(tmp_path / "rows.jsonl").__enter__()


def test_bytes_that_are_no_text_are_an_error_with_the_line(tmp_path: Path, make_row: MakeRow) -> None:
    line = make_row().to_line().encode()
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n" + line.replace(b"407.", b"\xff\xfe") + b"\n")
    with pytest.raises(InvalidArgumentError, match=r"rows\.jsonl:2: expected a row"):
        list(read_rows(tmp_path / "rows.jsonl"))


# Keeping aside -------------------------------------------------------------------------------------------------------


def test_files_are_kept_aside_under_a_number_that_is_free_for_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "missing.json"]
    for path in paths[:2]:
        path.write_text(path.name, encoding="utf-8")
    (tmp_path / "b.1.json").symlink_to(tmp_path / "nowhere")
    keep_aside(paths)
    assert {path.name for path in tmp_path.iterdir()} == {"a.2.jsonl", "b.2.json", "b.1.json"}
    assert (tmp_path / "a.2.jsonl").read_text(encoding="utf-8") == "a.jsonl"
    keep_aside(paths)


def test_all_are_kept_aside_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.json"]
    for path in paths:
        path.write_text(path.name, encoding="utf-8")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "b.json":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KVzipPressError, match=r"expected to keep .*a\.jsonl aside"):
        keep_aside(paths)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.json"}
