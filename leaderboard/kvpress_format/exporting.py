"""Writes rows as folders of kvpress's leaderboard."""

import csv
import io
import json
import os
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import yaml

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import digest_of, to_json
from kvzip_press.leaderboard.analysis.summary import find_full, one_table, split
from kvzip_press.leaderboard.kvpress_format.layout import (
    COLUMNS,
    CONFIG,
    EXTRA,
    METRICS,
    NO_PRESS,
    PREDICTIONS,
    Folder,
    column_of,
    subset_of,
)
from kvzip_press.leaderboard.kvpress_format.staging import new_folders, write_folder
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.rows.sealed_line import sealed

_METRIC_NAMES = {"ruler": "string_match"}  # the name that kvpress's scorer of the data set uses; "score" for all others


def export_rows(rows: Iterable[Row], folder: str | os.PathLike[str], *, data_dir: str | None = None) -> list[Path]:
    """Writes a folder for each task, model, press and ratio of the rows.

    The full cache is called ``no_press``, as in kvpress; other labels become names, such as ``kvzip_local_replay`` for
    "KVzip (local replay)". A row's tag "subset" becomes its line's task, as in RULER. Ratios have two decimals in the
    names, and all of them where two of a run would have the same; the configuration has them whole.

    All folders are written or none.

    Args:
        rows: At least one.
        folder: Where the folders go; created if it does not exist.
        data_dir: The part of the data set that was asked, such as "4096" for RULER.

    Returns:
        The folders.

    Raises:
        InvalidArgumentError: There are no rows; a folder of that name exists; two of the rows' cells would share one
            (two runs of one model); a question was answered twice, a task
            asked in several versions; or a text holds half of a surrogate pair, which UTF-8 cannot hold.
        RunDirectoryError: A folder cannot be written.
    """
    found = list(rows)
    if not found:
        raise InvalidArgumentError("expected rows to export, got none")
    full = find_full(found)
    groups = split(
        found, lambda row: (row.task, row.run_id, row.model, row.query_aware, row.press, row.compression_ratio)
    )
    ratios = {group[0].compression_ratio for group in groups}
    named = [(_folder_of(group[0], data_dir, full, ratios), one_table(group)) for group in groups]
    _check_names([name.name for name, _ in named], Path(folder))
    written = [(name.name, _files(name, group)) for name, group in named]
    with new_folders(Path(folder)) as unfinished:
        for name, files in written:
            write_folder(unfinished / name, files)
    return [Path(folder) / name for name, _ in written]


def _folder_of(row: Row, data_dir: str | None, full: str | None, ratios: Collection[float]) -> Folder:
    """Returns a row's folder. Whoever reads it takes the ratio from its configuration, so the name need only be new."""
    name = NO_PRESS if row.press == full else re.sub(r"\W+", "_", row.press.lower()).strip("_") or "press"
    short, mine = f"{row.compression_ratio:.2f}", row.compression_ratio
    alike = any(f"{other:.2f}" == short for other in ratios if other != mine)
    return Folder(row.task, data_dir, row.model, name, mine, row.query_aware, alike and float(short) != mine)


def _check_names(names: Sequence[str], folder: Path) -> None:
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidArgumentError(f"expected one folder a press and ratio, got several with the name {min(twice)}")
    if there := [name for name in names if os.path.lexists(folder / name)]:
        raise InvalidArgumentError(f"expected {folder} without the folder {there[0]}, which is there")


def _files(folder: Folder, rows: Sequence[Row]) -> dict[str, bytes]:
    """Returns the contents of a folder's files."""
    provenances = [provenance[0] for provenance in split((row.provenance for row in rows), to_json)]
    table = io.StringIO(newline="")
    names = ["task", "compression_ratio", *(column_of(name) for name in COLUMNS), "provenance"]
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(_line_of(row) | {"provenance": provenances.index(row.provenance)} for row in rows)
    texts = {
        PREDICTIONS: table.getvalue(),
        METRICS: json.dumps(_metrics(rows), indent=4, ensure_ascii=False),
        CONFIG: yaml.safe_dump(_config(folder, rows[0]), sort_keys=False, allow_unicode=True),
    }
    try:
        files = {name: text.encode() for name, text in texts.items()}
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"expected texts that UTF-8 can hold in {folder.name}, got half of a surrogate pair ({error.reason})"
        ) from error
    extra = {
        "run_id": rows[0].run_id,
        "press": rows[0].press,
        "task_version": rows[0].task_version,
        "provenances": provenances,
        "files": {name: digest_of(data) for name, data in files.items()},
    }
    return {**files, EXTRA: json.dumps(sealed(extra), indent=4).encode()}


def _config(folder: Folder, row: Row) -> dict[str, object]:
    """Returns the settings under kvpress's names; those that our runs do not have are left out."""
    return {
        "dataset": folder.dataset,
        "data_dir": folder.data_dir,
        "model": folder.model,
        "press_name": folder.press_name,
        "compression_ratio": folder.compression_ratio,
        "query_aware": folder.query_aware,
        "press_init_command": row.press,
        "seed": row.seed,
    }


def _line_of(row: Row) -> dict[str, object]:
    values = {column_of(name): getattr(row, name) for name in COLUMNS}
    lists = {"answer": repr(list(row.references)), "tags": json.dumps(row.tags, ensure_ascii=False)}
    return {"task": subset_of(row), "compression_ratio": row.compression_ratio} | values | lists


def _metrics(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Returns the metrics as kvpress's scorers give them: means over questions, not over contexts."""
    name = _METRIC_NAMES.get(rows[0].task, "score")
    return {
        subset_of(task[0]): {name: round(100 * statistics.fmean(row.score for row in task), 2)}
        for task in split(rows, subset_of)
    }
