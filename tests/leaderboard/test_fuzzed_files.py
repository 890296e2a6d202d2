"""Damaged files of runs and of kvpress's leaderboard: an error of ours, what was written, or less of it with a note."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvzip_press.errors import KVzipPressError
from kvzip_press.leaderboard.analysis.maps import head_maps
from kvzip_press.leaderboard.analysis.summary import split_tables, summarise
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row, run_id
from kvzip_press.leaderboard.run_files import heads_of, incomplete, rows_of
from kvzip_press.leaderboard.running.run_directory import RunRecord

_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
_TEXT = re.compile(rb'"[^"\n]*"')
_BOMBS = [b"9" * 100_000, b"1e999", b"-1", b"NaN", b"Infinity", b"1.5", b"0", b"null", b"true", b'"x"', b"[1]", b"{}"]
_INSERTED = [
    b"\0",
    b"\xff\xfe",
    b"\n",
    b'"',
    b",",
    b"}",
    b"[" * 100_000,
    b'{"a":' * 10_000,
    b"\xe2\x80\xae",
    b"\x1b[0m",
]


def mutations(data: bytes, n: int, seed: int) -> Iterator[bytes]:
    """Yields damaged copies: bytes flipped, deleted, doubled, cut off, lines moved, numbers and texts replaced."""
    rng = random.Random(seed)
    for number in range(n):
        begin = rng.randrange(len(data))
        end = min(len(data), begin + rng.choice([1, 2, 10, 100, 1000]))
        lines = data.splitlines(keepends=True)
        match number % 10:
            case 0 | 1 | 2:
                yield data[:begin] + bytes([data[begin] ^ (1 << rng.randrange(8))]) + data[begin + 1 :]
            case 3:
                yield data[:begin] + data[end:]
            case 4:
                yield data[:end] + data[begin:end] + data[end:]
            case 5:
                yield data[:begin]
            case 6:
                rng.shuffle(lines)
                yield b"".join(lines[: rng.randrange(len(lines) + 1)] + rng.choices(lines, k=rng.randrange(2)))
            case 7 | 8:
                wanted = _NUMBER if rng.random() < 0.7 or not _TEXT.search(data) else _TEXT
                found = rng.choice(list(wanted.finditer(data)))
                yield data[: found.start()] + rng.choice(_BOMBS) + data[found.end() :]
            case _:
                yield data[:begin] + rng.choice(_INSERTED) + data[begin:]


class Run:
    """The directory of a whole run, and what its files hold."""

    def __init__(self, path: Path, rows: list[Row], heads: list[HeadBudgets]) -> None:
        config = {"seed": 3, "tasks": [{"name": "niah"}]}
        self.path, self.rows, self.heads = path, rows, heads
        texts = {
            "rows.jsonl": "".join(row.to_line() + "\n" for row in rows),
            "heads.jsonl": "".join(line.to_line() + "\n" for line in heads),
            "run.json": RunRecord(run_id(config), config, {"torch": "2"}, len(rows)).to_line(indent=1) + "\n",
        }
        self.files = {name: text.encode() for name, text in texts.items()}
        for name, data in self.files.items():
            (path / name).write_bytes(data)

    def damaged(self, name: str, n: int) -> Iterator[str]:
        """Yields, for each way to damage a file, what comes of reading the directory."""
        for seed, data in enumerate(mutations(self.files[name], n, len(name))):
            (self.path / name).write_bytes(data)
            yield self._read(seed)
        (self.path / name).write_bytes(self.files[name])

    def _read(self, seed: int) -> str:
        try:
            rows, heads = rows_of(self.path), heads_of(self.path)
            for table in split_tables(rows):
                summarise(table)
            head_maps(heads)
            note = incomplete(self.path, rows, heads)
        except KVzipPressError:
            return "refused"
        in_order = [row for row in self.rows if row in rows], [line for line in self.heads if line in heads]
        if in_order == (self.rows, self.heads) and (len(rows), len(heads)) == (len(self.rows), len(self.heads)):
            return "equal"
        assert (len(in_order[0]), len(in_order[1])) == (len(rows), len(heads)), f"another row came of mutation {seed}"
        assert note or not heads, f"rows were left out without a note in mutation {seed}"
        return "less, with a note"


@pytest.fixture
def run(tmp_path: Path, make_table: Callable[..., list[Row]], make_heads: Callable[..., list[HeadBudgets]]) -> Run:
    name = run_id({"seed": 3, "tasks": [{"name": "niah"}]})
    rows = make_table(2, n_questions=1, tasks=("niah",), run_id=name)
    heads = [HeadBudgets.from_json(line.to_json()) for line in make_heads(name)]
    keys = {line.key for line in heads}
    return Run(
        tmp_path,
        [row for row in rows if (row.task, row.sample_id, "", row.press, row.compression_ratio) in keys],
        heads,
    )


@pytest.mark.parametrize(("name", "n"), [("rows.jsonl", 500), ("heads.jsonl", 300), ("run.json", 150)])
def test_a_damaged_file_of_a_run_is_refused_or_read_as_it_was_written(run: Run, name: str, n: int) -> None:
    came = list(run.damaged(name, n))
    assert len(came) == n and came.count("refused") > 0.7 * n
    assert name == "run.json" or came.count("less, with a note") > 0


def test_a_directory_of_an_older_version_is_refused_or_read_with_a_note(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Without checksums a row may say something else afterwards, within what rows may say: the note is about that."""
    lines = [json.loads(line) for line in run.files["rows.jsonl"].splitlines()]
    older = [{name: value for name, value in line.items() if name not in ("seal", "task_version")} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in older).encode()
    caplog.set_level(logging.WARNING)
    for data in mutations(text, 150, 1):
        (run.path / "rows.jsonl").write_bytes(data)
        caplog.clear()
        try:
            rows = rows_of(run.path)
            for table in split_tables(rows):
                summarise(table)
        except KVzipPressError:
            continue
        assert all(0 <= row.score <= 1 for row in rows)
        assert not rows or sum("no checksum" in record.message for record in caplog.records) == 1


# Folders of kvpress --------------------------------------------------------------------------------------------------


def imported(folder: Path, name: str, data: bytes) -> list[Row] | None:
    """The rows of a folder in which a file has other contents; None if it is refused."""
    from kvzip_press.leaderboard.kvpress_format import import_rows

    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    try:
        return import_rows(folder)
    except KVzipPressError:
        return None
    finally:
        (folder / name).write_bytes(whole)


@pytest.fixture
def exported(tmp_path: Path, make_row: Callable[..., Row]) -> tuple[Path, list[Row]]:
    pytest.importorskip("yaml")
    from kvzip_press.leaderboard.kvpress_format import export_rows

    answers = {"407": 1.0, "no": 0.0, 'it is "407",\nof course': 1.0}
    rows = [
        make_row(question_id=str(number), prediction=said, score=score, tags={"depth": 0.5})
        for number, (said, score) in enumerate(answers.items())
    ]
    return export_rows(rows, tmp_path / "own")[0], rows


FILES = ("predictions.csv", "metrics.json", "config.yaml", "kvzip_press.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder_of_ours_is_refused_or_imported_as_it_was(exported: tuple[Path, list[Row]], name: str) -> None:
    folder, rows = exported
    came = [imported(folder, name, data) for data in mutations((folder / name).read_bytes(), 60, 2)]
    assert all(found in (None, rows) for found in came)
    assert came.count(None) > 50


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", FILES[:3])
def test_a_damaged_folder_without_checksums_is_refused_or_gives_rows_with_the_scores_of_their_predictions(
    exported: tuple[Path, list[Row]], name: str, older: bool
) -> None:
    """Folders of older versions, and those that kvpress wrote."""
    folder, _ = exported
    extra: dict[str, Any] = json.loads((folder / "kvzip_press.json").read_text(encoding="utf-8"))
    if older:
        kept = {name: extra[name] for name in ("run_id", "press", "provenances")}
        (folder / "kvzip_press.json").write_text(json.dumps(kept), encoding="utf-8")
    else:
        (folder / "kvzip_press.json").unlink()
        for changed in ("config.yaml", "metrics.json", "predictions.csv"):
            text = (folder / changed).read_text(encoding="utf-8").replace("hidden_facts", "ruler")
            (folder / changed).write_text(text, encoding="utf-8")
    for data in mutations((folder / name).read_bytes(), 40, 3):
        for row in imported(folder, name, data) or []:
            assert row.score in (0.0, 1.0) and 0 <= row.compression_ratio <= 1
