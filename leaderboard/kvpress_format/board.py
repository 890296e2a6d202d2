"""What kvpress's public leaderboard takes, and what it would do with rows of ours.

As its settings and the results on it were when they were last read (2026-08): they may have changed since.
"""

from collections.abc import Iterable, Mapping

from kvzip_press.leaderboard.kvpress_format.layout import subset_of
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.tasks.ruler.task import SUBSETS

MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B")
DATA_SET = ("ruler", "4096")
_SHOWN = 3


def notes_for_board(rows: Iterable[Row], data_sets: Mapping[str, tuple[str, str | None]]) -> list[str]:
    """Says why the board would not show these rows, or not beside those of others; empty if it would.

    Folders of any model and task are written all the same: kvpress's own programs read them.

    Args:
        rows: Those that are exported.
        data_sets: Task -> data set and its part, as they are exported.
    """
    found = list(rows)
    models = {row.model for row in found} - set(MODELS)
    others = {name for name, data_set in data_sets.items() if data_set != DATA_SET}
    subsets = {subset_of(row) for row in found if data_sets.get(row.task) == DATA_SET}
    notes = []
    if models:
        notes.append(f"its models are {' and '.join(MODELS)}, not {_listed(models)}")
    if others:
        notes.append(f"its data set is {' '.join(DATA_SET)}, not {_listed(others)}")
    if subsets and (absent := set(SUBSETS) - subsets):
        notes.append(f"its score is the mean of RULER's {len(SUBSETS)} tasks; these lack {_listed(absent)}")
    return [f"kvpress's leaderboard would not take all of it: {note}" for note in notes]


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
