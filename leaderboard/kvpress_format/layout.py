"""The names of the folders, of their files and of the columns."""

from dataclasses import dataclass, fields

from kvzip_press.leaderboard.file_names import file_name
from kvzip_press.leaderboard.rows.results import Row

PREDICTIONS, METRICS, CONFIG, EXTRA = "predictions.csv", "metrics.json", "config.yaml", "kvzip_press.json"
NO_PRESS = "no_press"  # kvpress's name of the full cache
THEIR_NAMES = {"prediction": "predicted_answer", "references": "answer"}  # columns that kvpress calls by another name
_IN_FILES = {"run_id", "model", "press", "compression_ratio", "query_aware", "provenance", "task", "task_version"}
COLUMNS = tuple(field.name for field in fields(Row) if field.name not in _IN_FILES)
"""The fields of a row that each line of the table holds; the others apply to the whole folder, or to many lines."""


@dataclass(frozen=True)
class Folder:
    """The parts of a folder's name.

    Attributes:
        dataset: The data set; here a task's name.
        data_dir: The part of the data set, None for all of it.
        model: The model.
        press_name: The press, as kvpress would name it.
        compression_ratio: Fraction removed.
        query_aware: Whether the question was compressed with the context.
        in_full: Whether the ratio is written in full instead of to two decimals, as kvpress does it: another one of the
            run has the same two.
    """

    dataset: str
    data_dir: str | None
    model: str
    press_name: str
    compression_ratio: float
    query_aware: bool
    in_full: bool = False

    @property
    def name(self) -> str:
        """The folder's name, whatever its parts are called: one folder, and never a path."""
        parts = [self.dataset, self.data_dir, self.model.replace("/", "--"), self.press_name]
        ratio = f"{self.compression_ratio:{'.10g' if self.in_full else '.2f'}}"
        ends = [ratio, "query_aware" if self.query_aware else None]
        return "__".join(file_name(part) for part in [*parts, *ends] if part)


def subset_of(row: Row) -> str:
    """Returns kvpress's name for a line's task: the row's part of the data set if it names one, else the data set."""
    return str(row.tags.get("subset", row.task))


def column_of(name: str) -> str:
    """Returns the name of the column for a row's field."""
    return THEIR_NAMES.get(name, name)
