"""Writes rows as folders of kvpress's leaderboard."""

import csv
import io
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import digest_of, to_json
from kvzip_press.leaderboard.analysis.summary import find_full, mean_of_known, one_table, split
from kvzip_press.leaderboard.kvpress_format.files import checked_settings
from kvzip_press.leaderboard.kvpress_format.layout import (
    COLUMNS,
    CONFIG,
    EXTRA,
    MEASURED,
    METRICS,
    NO_PRESS,
    OF_KVPRESS,
    PREDICTIONS,
    QUERY_AWARE,
    Folder,
    column_of,
    subset_of,
)
from kvzip_press.leaderboard.kvpress_format.staging import new_folders, write_folder
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.rows.sealed_line import sealed
from kvzip_press.leaderboard.tasks.ruler.task import RULERTask
from kvzip_press.untrusted import parse_json

RULER = "ruler"
_BY_HEADS = "duo_attention"  # in names of presses whose ratio is one of heads
_ROUNDED = 0.005  # less that was removed is the rounding of a ratio of 0
_METRIC_NAMES = {RULER: "string_match"}  # the name that kvpress's scorer of the data set uses; "score" for all others


def export_rows(
    rows: Iterable[Row],
    folder: str | os.PathLike[str],
    *,
    data_dir: str | None = None,
    data_sets: Mapping[str, tuple[str, str | None]] | None = None,
) -> list[Path]:
    """Writes a folder for each task, model, press and ratio of the rows.

    The full cache is called ``no_press``, as in kvpress; other labels become names, such as ``kvzip_local_replay`` for
    "KVzip (local replay)". A row's tag "subset" becomes its line's task, as in RULER. Names have two decimals of the
    ratio; of folders that would have one name (0.96875 and 0.97, or two runs of one model) all but the first go into
    its sub-folders ``1``, ``2`` and so on, as kvpress does it. The whole ratio is in ``config.yaml``.

    A press at ratio 0 that still removes something (its budget or its threshold decides) has the ratio that was
    measured. DuoAttention's is one of heads: ``head_compression_ratio``, as in kvpress, and measured ratios line by
    line. Rows that `import_rows` read from kvpress's own folders keep the settings and the names that they had there.

    All folders are written or none.

    Args:
        rows: At least one.
        folder: Where the folders go; created if it does not exist.
        data_dir: The part of the data set that was asked, such as "4096" for RULER; of tasks not in ``data_sets``.
        data_sets: Task -> data set and its part, where those have other names on kvpress's board than here; see
            `data_sets_of`.

    Returns:
        The folders.

    Raises:
        InvalidArgumentError: There are no rows; a folder of that name exists; names that differ would become the same
            one; a question was answered twice, a task asked in several versions; settings of kvpress in a row are
            broken; or a text holds half of a surrogate pair, which UTF-8 cannot hold.
        RunDirectoryError: A folder cannot be written.
    """
    found = list(rows)
    if not found:
        raise InvalidArgumentError("expected rows to export, got none")
    full, parts = find_full(found), dict(data_sets or {})
    groups = split(found, _cell_of)
    named = [
        (_folder_of(group, parts.get(group[0].task, (group[0].task, data_dir)), full), one_table(group))
        for group in groups
    ]
    paths = _paths([(one, group[0]) for one, group in named], Path(folder))
    written = [(path, _files(one, group)) for path, (one, group) in zip(paths, named, strict=True)]
    with new_folders(Path(folder)) as unfinished:
        for path, files in written:
            write_folder(unfinished / path, files)
    return [Path(folder) / path for path in paths]


def data_sets_of(config: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Returns which of kvpress's data sets, and which part of it, each task of a run is: RULER's, by its class.

    Args:
        config: The configuration of a run, as its record has it.
    """
    entries = [(entry.get("kind"), entry.get("task")) for entry in config.get("tasks", ()) if isinstance(entry, dict)]
    return {
        str(task.get("name")): (RULER, str(task["data_dir"]))
        for kind, task in entries
        if kind == RULERTask.__name__ and isinstance(task, dict) and "data_dir" in task
    }


def _cell_of(row: Row) -> tuple[object, ...]:
    return (
        row.task, row.run_id, row.model, row.query_aware, row.press, row.compression_ratio,
        row.provenance.get(OF_KVPRESS),
    )  # fmt: skip


def _folder_of(rows: Sequence[Row], data_set: tuple[str, str | None], full: str | None) -> Folder:
    """Returns the folder with its settings under kvpress's names; those that our runs do not have are left out."""
    row, (dataset, data_dir) = rows[0], data_set
    name = NO_PRESS if row.press == full else re.sub(r"\W+", "_", row.press.lower()).strip("_") or "press"
    theirs = _settings_of(row)
    settings = {
        "dataset": dataset,
        "data_dir": data_dir,
        "model": row.model,
        "press_name": name,
        **({} if theirs else _amount(rows, name)),
        QUERY_AWARE: row.query_aware,
        "press_init_command": row.provenance.get("press", row.press) if theirs else row.press,
        "seed": row.seed,
        **theirs,
    }
    if theirs and not any(name in theirs for name in MEASURED):
        settings["compression_ratio"] = row.compression_ratio
    return Folder(settings)


def _settings_of(row: Row) -> dict[str, Any]:
    """Returns what `import_rows` kept of kvpress's settings; empty for rows of this package."""
    if (text := row.provenance.get(OF_KVPRESS)) is None:
        return {}
    where = f"the provenance of the row {row.sample_id!r:.40} of {row.press!r:.40}"
    try:
        kept = dict(parse_json(text))
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"{where}: expected {OF_KVPRESS}, an object in JSON, got {error}") from error
    named = {"dataset": row.task, "model": row.model}
    return {name: value for name, value in checked_settings({**kept, **named}, where).items() if name not in named}


def _amount(rows: Sequence[Row], press_name: str) -> dict[str, float]:
    """Returns how much was removed: as asked; as measured where a press does not go by the ratio; or a ratio of heads.

    DuoAttention's ratio is one of heads, of which the streaming ones keep a window.
    """
    asked, kept = rows[0].compression_ratio, mean_of_known(row.kept_fraction for row in rows)
    if _BY_HEADS in press_name:
        return {"head_compression_ratio": asked}
    decided = asked == 0 and kept is not None and kept < 1 - _ROUNDED
    return {"compression_ratio": round(1 - (kept or 0.0), 4) if decided else asked}


def _paths(found: Sequence[tuple[Folder, Row]], folder: Path) -> list[str]:
    """Returns the paths of the folders inside another: their names, with numbers where several have one name.

    Only ratios and runs are told apart by a number. Presses or models of which names make the same one are not.
    """
    paths: list[str] = []
    places: dict[str, list[tuple[str, ...]]] = {}
    for one, row in found:
        same, place = places.setdefault(one.name, []), (row.task, row.model, row.press)
        if same and place != same[0]:
            raise InvalidArgumentError(
                f"expected tasks, models and presses whose names are not the same once they are names of folders, got "
                f"several with the name {one.name}: {same[0]} and {place}"
            )
        paths.append(f"{one.name}/{len(same)}" if same else one.name)
        same.append(place)
    if there := [name for name in places if os.path.lexists(folder / name)]:
        raise InvalidArgumentError(
            f"expected {folder} without the folder {there[0]}, which is there: remove it, or take another folder"
        )
    return paths


def _files(folder: Folder, rows: Sequence[Row]) -> dict[str, bytes]:
    """Returns the contents of a folder's files."""
    provenances = [provenance[0] for provenance in split((row.provenance for row in rows), to_json)]
    table = io.StringIO(newline="")
    names = ["task", "compression_ratio", *(column_of(name) for name in COLUMNS), "provenance"]
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    is_measured = any(name in folder.config for name in MEASURED)
    writer.writerows(_line_of(row, is_measured) | {"provenance": provenances.index(row.provenance)} for row in rows)
    texts = {
        PREDICTIONS: table.getvalue(),
        METRICS: json.dumps(_metrics(rows, str(folder.config["dataset"])), indent=4, ensure_ascii=False),
        CONFIG: yaml.safe_dump(dict(folder.config), sort_keys=False, allow_unicode=True),
    }
    try:
        files = {name: text.encode() for name, text in texts.items()}
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"expected texts that UTF-8 can hold in {folder.name}, got half of a surrogate pair ({error.reason})"
        ) from error
    extra = {
        "run_id": rows[0].run_id,
        "task": rows[0].task,
        "press": rows[0].press,
        "compression_ratio": rows[0].compression_ratio,
        "task_version": rows[0].task_version,
        "provenances": provenances,
        "files": {name: digest_of(data) for name, data in files.items()},
    }
    return {**files, EXTRA: json.dumps(sealed(extra), indent=4).encode()}


def _line_of(row: Row, is_measured: bool) -> dict[str, object]:
    known = is_measured and row.kept_fraction is not None
    ratio = 1 - (row.kept_fraction or 0.0) if known else row.compression_ratio
    values = {column_of(name): getattr(row, name) for name in COLUMNS}
    lists = {"answer": repr(list(row.references)), "tags": json.dumps(row.tags, ensure_ascii=False)}
    return {"task": subset_of(row), "compression_ratio": ratio} | values | lists


def _metrics(rows: Sequence[Row], dataset: str) -> dict[str, dict[str, float]]:
    """Returns the metrics as kvpress's scorers give them: means over questions, not over contexts."""
    name = _METRIC_NAMES.get(dataset, "score")
    return {
        subset_of(task[0]): {name: round(100 * statistics.fmean(row.score for row in task), 2)}
        for task in split(rows, subset_of)
    }
