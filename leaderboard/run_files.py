"""What the directory of a run holds, read as a whole; and rows of another program, stored as one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvzip_press.errors import RunDirectoryError
from kvzip_press.files import replacing
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.line_file import read_lines
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.running.run_directory import HEADS, ROWS, RUN, OfRun, RunRecord, lines_of


def rows_of(path: str | os.PathLike[str]) -> list[Row]:
    """Reads the rows of a run directory.

    Raises:
        RunDirectoryError: The directory has no rows, or rows of another run than its record says.
        InvalidArgumentError: A row is damaged.
    """
    if not (Path(path) / ROWS).is_file():
        raise RunDirectoryError(f"expected the directory of a run, with {ROWS} in it, got {path}")
    return _lines_of(Path(path), ROWS, Row)


def heads_of(path: str | os.PathLike[str]) -> list[HeadBudgets]:
    """Reads what the heads kept from a run directory; empty if it holds no such file. Raises as `rows_of` does."""
    return _lines_of(Path(path), HEADS, HeadBudgets) if (Path(path) / HEADS).is_file() else []


def _lines_of(path: Path, name: str, kind: type[OfRun]) -> list[OfRun]:
    """Reads a file of lines; they must be of the run that the directory is of, if it says so."""
    known = (path / RUN).is_file()
    return list(lines_of(path / name, kind, RunRecord.read(path)) if known else read_lines(path / name, kind))


def config_of(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Returns the configuration of a run directory; empty if it has no record, as rows of other programs.

    Raises:
        RunDirectoryError: The record cannot be read, or was changed.
    """
    return RunRecord.read(path).config if (Path(path) / RUN).is_file() else {}


def incomplete(path: str | os.PathLike[str], rows: Sequence[Row], heads: Sequence[HeadBudgets] = ()) -> str:
    """Says what a run lacks that its record and its rows tell of, such as "3 of the run's 24 rows"; empty if nothing.

    With ``heads``, caches of the rows whose heads are missing count too, in tasks of which there are any.
    """
    said = []
    if (Path(path) / RUN).is_file() and len(rows) < (n_rows := RunRecord.read(path).n_rows):
        said.append(f"{len(rows)} of the run's {n_rows} rows")
    tasks, known = {line.task for line in heads}, {line.key for line in heads}
    caches = {
        (row.task, row.sample_id, row.question_id if row.query_aware else "", row.press, row.compression_ratio)
        for row in rows
        if row.task in tasks
    }
    if caches - known:
        said.append(f"heads of {len(caches & known)} of {len(caches)} caches")
    return "; ".join(said)


def store(rows: Iterable[Row], output: str | os.PathLike[str]) -> int:
    """Writes rows from another program into a directory that has none, and returns how many there were.

    The file is written whole or not at all.

    Raises:
        RunDirectoryError: The directory already holds rows.
        CacheFileError: The file cannot be written.
    """
    file = Path(output) / ROWS
    if os.path.lexists(file):
        raise RunDirectoryError(f"expected a directory without {ROWS}, got {output}")
    lines = [row.to_line() + "\n" for row in rows]
    with replacing(file, parents=True) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    return len(lines)
