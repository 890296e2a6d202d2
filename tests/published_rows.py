"""Rows of the published runs of `evidence` grids, and what follows from those of the tasks that count."""

from __future__ import annotations

import gzip
import json
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from kvzip_press.leaderboard.analysis.counting import TaskRange, task_ranges
from kvzip_press.leaderboard.analysis.summary import Cell, summarise, summarise_tasks
from kvzip_press.leaderboard.rows.results import Row

RESULTS = Path(__file__).resolve().parents[1] / "leaderboard" / "results"
EVIDENCE = sorted(path.name for path in RESULTS.glob("evidence-*"))
CellKey = tuple[str, float]
DEFAULTS = {one.name: one.default for one in fields(Row) if one.default is not MISSING}


@cache
def published(folder: str) -> tuple[Row, ...]:
    """All rows, without a look at their seals and types, which `verify` checks: that takes most of the time."""
    with gzip.open(RESULTS / folder / "rows.jsonl.gz", "rt", encoding="utf-8") as file:
        return tuple(map(_unchecked, map(json.loads, file)))


def _unchecked(values: dict[str, Any]) -> Row:
    del values["seal"]
    row = object.__new__(Row)
    vars(row).update({**DEFAULTS, **values, "references": tuple(values["references"])})
    return row


@cache
def ranges(folder: str) -> dict[str, TaskRange]:
    asked = [row for row in published(folder) if not row.follows_full_cache]
    return {one.task: one for one in task_ranges(summarise_tasks(asked))}


@cache
def rows_of(folder: str, kind: str = "counted") -> tuple[Row, ...]:
    """The rows of a kind: "counted", of these "real text" and "made text", and "agreement"."""
    if kind == "agreement":
        return tuple(row for row in published(folder) if row.follows_full_cache)
    counted = {task for task, one in ranges(folder).items() if one.counts}
    real = {row.task for row in published(folder) if row.provenance["data_revision"] != "generated"} & counted
    tasks = {"counted": counted, "real text": real, "made text": counted - real}[kind]
    return tuple(row for row in published(folder) if row.task in tasks)


@cache
def cells_of(folder: str, kind: str = "counted") -> dict[CellKey, Cell]:
    return {(cell.press, cell.compression_ratio): cell for cell in summarise(rows_of(folder, kind))}


def mean_of(folder: str, cell: str) -> float:
    """The accuracy of ``press @ ratio`` in a run, or in one kind of its tasks, as in "evidence-smollm2, real text"."""
    name, _, kind = folder.partition(", ")
    press, _, ratio = cell.rpartition(" @ ")
    return cells_of(name, kind or "counted")[press, float(ratio)].accuracy
