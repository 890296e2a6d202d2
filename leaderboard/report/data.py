"""The page's data: aggregated plain values for JSON, so that a run of any length gives a page of a few MB."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.correlation import correlation_of_rows
from kvzip_press.leaderboard.analysis.counting import task_ranges
from kvzip_press.leaderboard.analysis.curves import areas_over_bytes, areas_under_curves, relative_performance
from kvzip_press.leaderboard.analysis.looks import looks
from kvzip_press.leaderboard.analysis.maps import head_maps, needle_maps
from kvzip_press.leaderboard.analysis.references import Judgement, judge
from kvzip_press.leaderboard.analysis.reuse import reuses
from kvzip_press.leaderboard.analysis.statistics import Comparison
from kvzip_press.leaderboard.analysis.summary import Cell, context_key, split, split_tables, summarise, summarise_tasks
from kvzip_press.leaderboard.analysis.ties import ties
from kvzip_press.leaderboard.analysis.times import times
from kvzip_press.leaderboard.kvpress_format.layout import OF_KVPRESS
from kvzip_press.leaderboard.report.examples import examples
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row


def page_data(rows: Iterable[Row], heads: Iterable[HeadBudgets]) -> dict[str, Any]:
    """Returns the page's tables as plain JSON values: one per run and model, query-aware and query-agnostic apart."""
    heads, split_rows = list(heads), split_tables(rows)
    tables = [
        _table(table, [budgets for budgets in heads if budgets.run_id == table[0].run_id]) for table in split_rows
    ]
    correlations = [one for pair in itertools.combinations(split_rows, 2) if (one := _correlation(*pair)) is not None]
    found: dict[str, Any] = rounded({"tables": tables, "correlations": correlations})
    return found


def _correlation(one: Sequence[Row], other: Sequence[Row]) -> dict[str, Any] | None:
    """Returns how the ranks of presses on two models correlate; None for tables of one model, or that share too few."""
    first, second = one[0], other[0]
    kinds = [(row.query_aware, row.follows_full_cache) for row in (first, second)]
    if first.model == second.model or kinds[0] != kinds[1]:
        return None
    try:
        found = correlation_of_rows(one, other)
    except InvalidArgumentError:  # they share too few presses
        return None
    return {
        "runs": [[row.model, row.run_id] for row in (first, second)],
        "query_aware": first.query_aware,
        "follows": first.follows_full_cache,
        "mean": found.mean,
        "interval": found.interval,
        "by_ratio": [[ratio, value, found.n_presses[ratio]] for ratio, value in found.by_ratio.items()],
        "n_contexts": [len({context_key(row) for row in table}) for table in (one, other)],
    }


def rounded(value: Any) -> Any:
    """Rounds every float in a value to five significant digits: all that a page shows, in a third of the bytes.

    What is not finite becomes None, which is shown as a dash.
    """
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


def _table(rows: Sequence[Row], heads: Sequence[HeadBudgets]) -> dict[str, Any]:
    judgement = judge(rows)
    task_cells = split(summarise_tasks(rows), lambda cell: cell.task)
    task_rows = split(rows, lambda row: row.task)
    judgements = [judge(task) for task in task_rows] if len(task_rows) > 1 else [judgement]
    all_cells = summarise(rows)
    relative = relative_performance(cell for cells in task_cells for cell in cells)
    areas, bytes_areas = areas_under_curves(all_cells), areas_over_bytes(all_cells)
    detectable = [one.detectable for one in judgement.against_full.values() if one.detectable]
    return {
        "run_id": rows[0].run_id,
        "model": rows[0].model,
        "query_aware": rows[0].query_aware,
        "follows": rows[0].follows_full_cache,
        "full": judgement.full,
        "kvzip": judgement.kvzip,
        "tasks": [task[0].task for task in task_rows],
        "presses": list(dict.fromkeys(row.press for row in rows)),
        "n_contexts": len({context_key(row) for row in rows}),
        "n_questions": len({(context_key(row), row.question_id) for row in rows}),
        "looks": {press: asdict(look) for press, look in looks((row.press for row in rows), judgement.full).items()},
        "times": _times(rows),
        "ties": [str(tie) for tie in ties(rows)],
        "areas": None if areas is None else asdict(areas),
        "areas_over_bytes": None if bytes_areas is None else asdict(bytes_areas),
        "detectable": [min(detectable), max(detectable)] if detectable else None,
        "not_counting": [str(one) for one in task_ranges(summarise_tasks(rows)) if not one.counts],
        "cells": _cells(all_cells, judgement, relative, rows)
        + [
            cell
            for cells, judged, of_task in zip(task_cells, judgements, task_rows, strict=True)
            for cell in _cells(cells, judged, relative_performance(cells), of_task)
        ],
        "heads": [asdict(found) for found in head_maps(heads)],
        "needles": [asdict(found) for found in needle_maps(rows)],
        "examples": examples(rows),
        "provenance": _provenance(rows),
    }


def _times(rows: Sequence[Row]) -> dict[str, Any] | None:
    measured = times(rows)
    return None if measured is None else {**asdict(measured), "differ": measured.differ}


def _cells(
    cells: Sequence[Cell], judgement: Judgement, relative: Mapping[tuple[str, float], float], rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """Returns the cells of all tasks or of one, each with its marks and its score relative to the full cache's.

    ``pays_from`` is the number of questions about a context from which on it takes less time than the full cache.
    """
    of_table = {"run_id", "model", "query_aware"}
    pays = {(one.press, one.compression_ratio): one.break_even for one in reuses(rows)}
    return [
        {name: value for name, value in asdict(cell).items() if name not in of_table}
        | {
            "relative": relative.get(key),
            "pays_from": None if cell.press == judgement.full else pays.get(key),
            "marks": judgement.marks(*key),
            "against_full": _comparison(judgement.against_full.get(key)),
            "against_kvzip": _comparison(judgement.against_kvzip.get(key)),
        }
        for cell in cells
        for key in [(cell.press, cell.compression_ratio)]
    ]


def _comparison(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    return {
        "difference": comparison.difference,
        "interval": comparison.interval,
        "p_value": comparison.adjusted_p_value,
        "detectable": comparison.detectable,
    }


def _provenance(rows: Sequence[Row]) -> dict[str, str]:
    """Returns what the rows were made from and with; a name with several values (a run continued elsewhere) has all."""
    values: dict[str, list[str]] = {}
    for row in rows:
        for name, value in {**row.provenance, "seed": str(row.seed)}.items():
            if name != OF_KVPRESS and value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: "; ".join(found) for name, found in values.items()}
