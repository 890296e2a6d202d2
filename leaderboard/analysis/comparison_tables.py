"""What a run says of its presses, as tables of text: on which tasks, how accurate, how different, in which storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.counting import TaskRange, task_ranges
from kvzip_press.leaderboard.analysis.curves import areas_over_bytes
from kvzip_press.leaderboard.analysis.references import find_kvzip
from kvzip_press.leaderboard.analysis.statistics import Comparison, compare
from kvzip_press.leaderboard.analysis.summary import (
    Cell,
    Table,
    context_key,
    find_full,
    mean_of_known,
    one_table,
    split,
    summarise,
    summarise_tasks,
)
from kvzip_press.leaderboard.analysis.written_table import TextTable, accuracy_lines, area_text
from kvzip_press.leaderboard.options import check_name
from kvzip_press.leaderboard.rows.results import Row

_PAIRED = (
    "Differences on the same questions, in brackets the p of a sign-flip test over contexts, not adjusted. "
    "*: significant at 5 % after Holm's adjustment for the comparisons of the table, {n} in number. Detectable: the "
    "smallest difference that contexts like these show in four of five repetitions."
)
_MADE = "generated"  # the data revision of tasks that are made from a seed


@dataclass(frozen=True)
class _Group:
    """Rows of some of a table's tasks."""

    name: str
    rows: Table

    @property
    def size(self) -> str:
        tasks, contexts = {row.task for row in self.rows}, {context_key(row) for row in self.rows}
        questions = {(*context_key(row), row.question_id) for row in self.rows}
        return f"{_count(len(tasks), 'task')}, {_count(len(contexts), 'context')}, {_count(len(questions), 'question')}"


def comparison_tables(rows: Iterable[Row], reference: str | None = None) -> list[TextTable]:
    """Compares all presses of a table with each other, storages included.

    There is a table of the tasks; accuracies and paired differences over those that count, and apart for tasks made
    from a seed and those on existing text, where the rows know which is which; what was kept; and storages, each with
    its difference from the model's own. Presses stand in the order of their areas over bytes, the best first.

    Args:
        rows: Rows of one table, of answers or of agreement with the full cache.
        reference: The label that presses are compared with besides the full cache; by default KVzip's, if it is there.

    Raises:
        InvalidArgumentError: The rows are of several tables, or the reference is none of their presses.
        MissingDependencyError: scipy is absent.
    """
    rows = one_table(rows)
    _check_labels(rows, reference)
    reference = reference or find_kvzip(rows)
    full = None if any(row.follows_full_cache for row in rows) else find_full(rows)  # it agrees with itself
    references, ranges = dict.fromkeys((reference, full)), task_ranges(summarise_tasks(rows))
    tables = [_tasks(ranges, rows)] if ranges else []
    groups, bases = _groups(rows, ranges), _bases(rows)
    for group in groups:
        own = group.rows.where(lambda row: bases[row.press] == row.press)
        cells = _ranked(summarise(own))
        presses = list(dict.fromkeys(cell.press for cell in cells))
        tables.append(_accuracies(group, cells))
        tables += [_differences(group, own, presses, one) for one in references if one in presses]
        if group is groups[0]:
            tables += [_kept(cells), _storages(group, presses, bases)]
    return [table for table in tables if table.rows]


def press_table(rows: Iterable[Row], press: str, reference: str | None = None) -> TextTable:
    """Compares one press with the reference, with intervals: over the tasks that count, by kind of text, and by task.

    Args:
        rows: As for `comparison_tables`.
        press: Its label.
        reference: As for `comparison_tables`; without it and without KVzip, the full cache.

    Raises:
        InvalidArgumentError: As for `comparison_tables`; or there is no such press, or nothing to compare it with.
        MissingDependencyError: scipy is absent.
    """
    rows = one_table(rows)
    _check_labels(rows, press, reference)
    reference = reference or find_kvzip(rows) or find_full(rows)
    if reference in (None, press):
        others = [one for one in (find_full(rows), *(row.press for row in rows)) if one not in (None, press)]
        such = f", such as {others[0]!r}" if others else ""
        raise InvalidArgumentError(
            f"expected a reference other than {press!r}, got {reference!r}: give another (--reference){such}"
        )
    both = rows.where(lambda row: row.press in (press, reference))
    groups = _groups(both, task_ranges(summarise_tasks(rows)))
    tasks = dict.fromkeys(row.task for row in groups[0].rows)
    groups += [_of_task(groups[0].rows, task) for task in tasks if len(tasks) > 1]
    found = [(group, _compared(group.rows, press, reference)) for group in groups]
    ratios = sorted({ratio for _, of_group in found for ratio in of_group})
    lines = [[group.name, *(_with_interval(of_group.get(ratio)) for ratio in ratios)] for group, of_group in found]
    detectable = [found[0][1].get(ratio) for ratio in ratios]
    lines.append([f"detectable, {groups[0].name}", *("-" if not one else _plain(one.detectable) for one in detectable)])
    note = "Differences on the same questions, with bootstrapped 95 % intervals over contexts and p, not adjusted."
    return TextTable(f"{press} minus {reference}", ["removed", *_texts(ratios)], lines, note)


def _check_labels(rows: Sequence[Row], *labels: str | None) -> None:
    for label in labels:
        if label is not None:
            check_name("a press of these rows", label, {row.press for row in rows})


def _groups(rows: Table, ranges: Sequence[TaskRange]) -> list[_Group]:
    """Returns the rows of tasks that count (of all, where nothing says which), and of each kind of text among them."""
    not_counted = {one.task for one in ranges if not one.counts}
    counted = rows.where(lambda row: row.task not in not_counted)
    if not counted:
        return [_Group("all tasks, none of which counts", rows)]
    name = "all tasks" if not not_counted else "tasks that count"
    revisions = {row.provenance.get("data_revision") for row in counted}
    made = counted.where(lambda row: row.provenance.get("data_revision") == _MADE)
    if None in revisions or not 0 < len(made) < len(counted):
        return [_Group(name, counted)]
    others = counted.where(lambda row: row.provenance["data_revision"] != _MADE)
    return [_Group(name, counted), _Group("generated text", made), _Group("existing text", others)]


def _bases(rows: Sequence[Row]) -> dict[str, str]:
    """Returns for each label that of the same press in its first storage: "kvzip" for "kvzip, int8"."""
    shorter = {row.press: row.press.removesuffix(f", {row.storage}") for row in rows}
    return {label: base if base in shorter else label for label, base in shorter.items()}


def _ranked(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the full cache's cells, then those of presses by their areas, or by mean accuracies without such."""
    full, areas = find_full(cells), areas_over_bytes(cells)

    def worth(of_press: Sequence[Cell]) -> tuple[bool, float, float]:
        press = of_press[0].press
        area = None if areas is None else areas.areas.get(press)
        return press != full, -(area or 0.0), -fmean(cell.accuracy for cell in of_press)

    return list(chain(*sorted(split(cells, lambda cell: cell.press), key=worth)))


def _tasks(ranges: Sequence[TaskRange], rows: Sequence[Row]) -> TextTable:
    head = ["task", "tokens", "contexts", "questions", "full cache", "floor", "counts"]
    lines = []
    for one in ranges:
        contexts = split((row for row in rows if row.task == one.task), context_key)
        tokens = mean_of_known(context[0].n_context_tokens for context in contexts)
        questions = sum(len({row.question_id for row in context}) for context in contexts)
        error = "" if one.standard_error is None else f" ± {one.standard_error:.3f}"
        sizes = ["-" if tokens is None else f"{tokens:.0f}", str(len(contexts)), str(questions)]
        lines.append([one.task, *sizes, f"{one.full:.3f}{error}", f"{one.floor:.3f}", "yes" if one.counts else "no"])
    note = "A task counts if the full cache is clearly above the floor (random eviction) and below the ceiling."
    reasons = [f"{one.task}: {one.why_not}." for one in ranges if not one.counts]
    return TextTable("Which tasks count", head, lines, " ".join([note, *reasons]))


def _accuracies(group: _Group, cells: Sequence[Cell]) -> TextTable:
    areas, (head, lines) = areas_over_bytes(cells), accuracy_lines(cells, decimals=3)
    follows = any(cell.kl is not None for cell in cells)
    what = "Agreement with the full cache" if follows else "Accuracy"
    note = f"{group.size}. ± standard error over contexts"
    if follows:
        note += "; behind it the KL divergence from the full cache, in nats"
    if areas:
        note += f"; areas over {areas.low / 1e6:.3g} to {areas.high / 1e6:.3g} MB, on a logarithmic axis"
    return TextTable(f"{what}, {group.name}", head, lines, f"{note}.")


def _differences(group: _Group, rows: Table, presses: Sequence[str], reference: str) -> TextTable:
    found = {(one.press, one.compression_ratio): one for one in compare(rows, reference, intervals=False)}
    ratios = sorted({ratio for _, ratio in found})
    lines = []
    for press in presses:
        mine = [found.get((press, ratio)) for ratio in ratios]
        detectable = [one.detectable for one in mine if one and one.detectable is not None]
        between = f"{min(detectable):.3f} to {max(detectable):.3f}" if detectable else "-"
        if any(mine):
            lines.append([press, *(_with_p(one) for one in mine), between])
    head = [f"minus {reference}", *_texts(ratios), "detectable"]
    return TextTable(f"Minus {reference}, {group.name}", head, lines, _PAIRED.format(n=len(found)))


def _kept(cells: Sequence[Cell]) -> TextTable:
    known = {(cell.press, cell.compression_ratio): cell for cell in cells if cell.compression_ratio}
    ratios = sorted({ratio for _, ratio in known})
    presses = dict.fromkeys(press for press, _ in known)
    lines = [[press, *(_size(known.get((press, ratio))) for ratio in ratios)] for press in presses]
    note = "The fraction of pairs that a cache held, and its bytes in MB, means over contexts."
    return TextTable("What was kept", ["asked to remove", *_texts(ratios)], lines, note)


def _storages(group: _Group, presses: Sequence[str], bases: Mapping[str, str]) -> TextTable:
    """Returns the table of presses that were run in several storages."""
    areas, lines = areas_over_bytes(summarise(group.rows)), dict[str, dict[float, str]]()
    for press in presses:
        of_press = _of_press(group.rows, press, bases)
        if all(row.press == press for row in of_press):
            continue
        found = {(one.press, one.compression_ratio): one for one in compare(of_press, press, intervals=False)}
        for cell in summarise(of_press):
            key = cell.press, cell.compression_ratio
            lines.setdefault(cell.press, {})[cell.compression_ratio] = _stored(cell, found.get(key))
    ratios = sorted({ratio for figures in lines.values() for ratio in figures})
    rows = [
        [press, *(figures.get(ratio, "-") for ratio in ratios), "-" if areas is None else area_text(areas, press)]
        for press, figures in lines.items()
    ]
    note = (
        "Bytes are of a cache. In brackets the difference from the press's first storage with its p, not adjusted; "
        "behind an area, where the press was measured last: from there on it is that of a line to the full cache."
    )
    head = ["storage, removed", *_texts(ratios), "area over bytes"]
    return TextTable(f"Storages, {group.name}", head, rows, note)


def _of_task(rows: Table, task: str) -> _Group:
    return _Group(task, rows.where(lambda row: row.task == task))


def _of_press(rows: Table, press: str, bases: Mapping[str, str]) -> Table:
    """Returns the rows of a press in all storages."""
    return rows.where(lambda row: bases[row.press] == press)


def _compared(rows: Table, press: str, reference: str) -> dict[float, Comparison]:
    return {one.compression_ratio: one for one in compare(rows, reference) if one.press == press}


def _with_p(one: Comparison | None) -> str:
    return "-" if one is None else f"{one.difference:+z.3f} ({_p(one.p_value)}){'*' * one.is_significant}"


def _with_interval(one: Comparison | None) -> str:
    if one is None:
        return "-"
    interval = "" if one.interval is None else f" ({one.interval[0]:+z.3f} to {one.interval[1]:+z.3f})"
    return f"{one.difference:+z.3f}{interval}, p {_p(one.p_value)}"


def _stored(cell: Cell, one: Comparison | None) -> str:
    size = "" if cell.resident_bytes is None else f", {cell.resident_bytes / 1e6:.1f} MB"
    kl = "" if cell.kl is None else f", {cell.kl:z.4f} nats"
    return f"{cell.accuracy:.3f}{kl}{size}" + ("" if one is None else f" ({one.difference:+z.3f}, p {_p(one.p_value)})")


def _size(cell: Cell | None) -> str:
    if cell is None or cell.kept_fraction is None:
        return "-"
    size = "" if cell.resident_bytes is None else f", {cell.resident_bytes / 1e6:.1f}"
    return f"{cell.kept_fraction:.3f}{size}"


def _p(value: float) -> str:
    """Returns "<0.001", "0.004" or "0.12": as many decimals as a first figure takes."""
    if value < 0.001:
        return "<0.001"
    return f"{value:.3f}" if value < 0.0095 else f"{value:.2f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _texts(ratios: Iterable[float]) -> list[str]:
    return [f"{ratio:g}" for ratio in ratios]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
