"""The names of the folders, of their files and of the columns."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvzip_press.leaderboard.file_names import file_name
from kvzip_press.leaderboard.rows.results import Row

PREDICTIONS, METRICS, CONFIG, EXTRA = "predictions.csv", "metrics.json", "config.yaml", "kvzip_press.json"
NO_PRESS = "no_press"  # kvpress's name of the full cache
QUERY_AWARE = "query_aware"
MEASURED = ("threshold", "head_compression_ratio")
"""Settings that say how much is removed in another way than by a ratio, which is then measured, line by line."""

OF_KVPRESS = "kvpress_settings"
"""Where the provenance of a row that kvpress made holds the settings of its evaluation, as JSON."""

THEIR_NAMES = {"prediction": "predicted_answer", "references": "answer"}  # columns that kvpress calls by another name
_IN_FILES = {"run_id", "model", "press", "compression_ratio", "query_aware", "provenance", "task", "task_version"}
COLUMNS = tuple(field.name for field in fields(Row) if field.name not in _IN_FILES)
"""The fields of a row that each line of the table holds; the others apply to the whole folder, or to many lines."""

_NEEDLES = "needle_in_haystack"  # the one data set whose folders are named by a depth


@dataclass(frozen=True)
class Folder:
    """A folder of results.

    Attributes:
        config: The settings of the evaluation, as ``config.yaml`` has them: dataset, data_dir, model, press_name,
            compression_ratio (or one of `MEASURED` instead of it), query_aware, and others that kvpress names.
    """

    config: Mapping[str, Any]

    @property
    def amount(self) -> float:
        """How much is asked to be removed, in whatever way it is said: a ratio, a threshold, a ratio of heads."""
        said = (self.config.get(name) for name in (*MEASURED, "compression_ratio"))
        return float(next(value for value in said if value is not None))

    @property
    def name(self) -> str:
        """The folder's name, whatever its parts are called: one folder, and never a path.

        Two decimals of the amount: 0.875 is 0.88 and 0.9375 is 0.94, as kvpress writes them.
        """
        return "__".join([*self._names, f"{self.amount:.2f}", *map(file_name, self._endings)])

    @property
    def _names(self) -> list[str]:
        of = self.config
        parts = [of["dataset"], of.get("data_dir"), of["model"].replace("/", "--"), of["press_name"]]
        return [file_name(str(part)) for part in parts if part]

    @property
    def _endings(self) -> list[str]:
        of = self.config.get
        fraction, length, channels = of("fraction"), of("max_context_length"), of("key_channel_compression_ratio")
        depth = of("needle_depth") if of("dataset") == _NEEDLES else None
        return [
            *([] if fraction is None or fraction >= 1 else [f"fraction{fraction:.3f}"]),
            *([] if length is None else [f"max_context{length}"]),
            *([QUERY_AWARE] if of(QUERY_AWARE) else []),
            *([] if channels is None else [f"key_channel_cr{channels:.2f}"]),
            *([] if depth is None else [f"needle_depth{depth}"]),
        ]


def subset_of(row: Row) -> str:
    """Returns kvpress's name for a line's task: the row's part of the data set if it names one, else the data set."""
    return str(row.tags.get("subset", row.task))


def column_of(name: str) -> str:
    """Returns the name of the column for a row's field."""
    return THEIR_NAMES.get(name, name)
