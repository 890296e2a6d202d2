"""All pictures of a run in one folder."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from kvzip_press.files import sweep_temporaries
from kvzip_press.leaderboard.analysis.maps import HeadMap, NeedleMap, head_maps, needle_maps
from kvzip_press.leaderboard.analysis.references import find_kvzip
from kvzip_press.leaderboard.analysis.summary import split, split_tables, summarise, summarise_tasks
from kvzip_press.leaderboard.analysis.times import times
from kvzip_press.leaderboard.file_names import file_name
from kvzip_press.leaderboard.pictures.heat import (
    save_depth_map,
    save_head_map,
    save_head_maps,
    save_needle_map,
    save_task_map,
)
from kvzip_press.leaderboard.pictures.pareto import BYTES, TIME, save_pareto
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

Map = TypeVar("Map", HeadMap, NeedleMap)


def save_all(rows: Iterable[Row], heads: Iterable[HeadBudgets], folder: str | os.PathLike[str]) -> list[Path]:
    """Saves every picture of every table of the rows.

    For one table the files are ``pareto-bytes.png`` (only where pairs are stored in several ways, so that bytes are no
    matter of pairs alone; it is then the main one), ``pareto-kept.png``, ``pareto-time.png`` (only where times differ
    by more than they spread, see `times`), ``tasks.png``, ``heads.png`` and ``needles-<task>.png``; with several tables
    each has a folder, named after model and run. A picture that shows a single press shows KVzip (else the first that
    removes anything), and one that shows a single ratio shows the middle one; the page shows the others. Needles are
    shown by depth and length of one press, or by press and depth where a task has one length. Where several models have
    head maps of one press at one ratio, ``heads-of-models.png`` shows them side by side.

    Args:
        rows: May be empty: the axes are then empty too.
        heads: What the heads kept in the same runs; without it there is no ``heads.png``.
        folder: Created if it does not exist; what killed processes left half-written there is removed.

    Returns:
        The files.

    Raises:
        InvalidArgumentError: A press answered a question of a run twice at the same ratio.
        MissingDependencyError: Matplotlib is not installed.
        CacheFileError: A picture cannot be written; those before it are new and whole, the others as they were.
    """
    sweep_temporaries(Path(folder))
    heads, tables = list(heads), split_tables(rows) or [[]]
    paths = [
        path
        for table in tables
        for path in _save_table(
            table,
            [budgets for budgets in heads if table and budgets.run_id == table[0].run_id],
            Path(folder) / _folder_of(table) if len(tables) > 1 else Path(folder),
        )
    ]
    if len(beside := _beside(tables, heads)) > 1:
        paths.append(Path(folder) / "heads-of-models.png")
        save_head_maps(beside, paths[-1])
    return paths


def _beside(tables: Sequence[Sequence[Row]], heads: Sequence[HeadBudgets]) -> list[tuple[str, HeadMap]]:
    """Returns one map of each model, all of one press at one ratio: KVzip's at the middle ratio that all have."""
    maps: dict[str, dict[tuple[str, float], HeadMap]] = {}
    kvzip = next((name for table in tables if (name := find_kvzip(table))), None)
    for table in tables:
        mine = head_maps(budgets for budgets in heads if table and budgets.run_id == table[0].run_id)
        if mine and table[0].model not in maps:
            maps[table[0].model] = {(one.press, one.compression_ratio): one for one in mine}
    shared = [key for key in next(iter(maps.values()), {}) if key[1] > 0 and all(key in one for one in maps.values())]
    shared = [key for key in shared if key[0] == kvzip] or [key for key in shared if key[0] == shared[0][0]]
    if not shared:
        return []
    press, ratio = sorted(shared, key=lambda key: key[1])[len(shared) // 2]
    return [(f"{model}: {press}, {ratio:.4g} removed", one[press, ratio]) for model, one in maps.items()]


def _folder_of(table: Sequence[Row]) -> str:
    first = table[0]
    name = f"{first.model}-{first.run_id}" + ("-query-aware" if first.query_aware else "")
    name += "-agreement" if first.follows_full_cache else ""
    return file_name(name)


def _save_table(rows: Sequence[Row], heads: Sequence[HeadBudgets], folder: Path) -> list[Path]:
    cells = summarise(rows)
    tasks = list(dict.fromkeys(row.task for row in rows))
    title = f"{rows[0].model}, {tasks[0] if len(tasks) == 1 else f'{len(tasks)} tasks'}" if rows else ""
    ratios = sorted({cell.compression_ratio for cell in cells if cell.compression_ratio > 0})
    ratio = ratios[len(ratios) // 2] if ratios else 0.0
    paths = []
    if len({row.storage for row in rows}) > 1:
        paths.append(folder / "pareto-bytes.png")
        save_pareto(cells, paths[-1], title, cost=BYTES)
    paths.append(folder / "pareto-kept.png")
    save_pareto(cells, paths[-1], title)
    if (measured := times(rows)) is not None and measured.differ:
        paths.append(folder / "pareto-time.png")
        save_pareto(cells, paths[-1], title, cost=TIME)
    paths.append(folder / "tasks.png")
    save_task_map(summarise_tasks(rows), paths[-1], ratio, f"accuracy at {ratio:g} removed")
    for head_map in _telling(head_maps(heads), find_kvzip(rows), ratio)[:1]:
        paths.append(folder / "heads.png")
        save_head_map(
            head_map, paths[-1], f"kept by each head: {head_map.press}, {head_map.compression_ratio:g} removed"
        )
    for maps in split(needle_maps(rows), lambda needle_map: needle_map.task):
        paths.append(folder / f"needles-{file_name(maps[0].task)}.png")
        _save_needles(maps, paths[-1], find_kvzip(rows), ratio)
    return paths


def _save_needles(maps: Sequence[NeedleMap], path: Path, press: str | None, ratio: float) -> None:
    """Draws the maps of one task: those of all presses at a ratio where each is one column, else that of one press."""
    first = _telling(maps, press, ratio)[0]
    removed = f"{first.compression_ratio:g} removed"
    if len(first.lengths) > 1:
        save_needle_map(first, path, f"{first.task}: {first.press}, {removed}")
    else:
        ratios = {0.0, first.compression_ratio}
        alike = [one for one in maps if one.compression_ratio in ratios]
        save_depth_map(alike, path, f"{first.task}, {first.lengths[0]:,} tokens: {removed}")


def _telling(maps: Sequence[Map], press: str | None, ratio: float) -> list[Map]:
    """Sorts maps: those of the press first, among them those of the ratio; those that remove nothing come last."""
    return sorted(
        maps, key=lambda one: (one.compression_ratio == 0, one.press != press, one.compression_ratio != ratio)
    )
