"""What stands where: the names of the folders, of their files and of the columns."""

from dataclasses import dataclass, fields

from kvzip_press.leaderboard.rows.results import Row

PREDICTIONS, METRICS, CONFIG, EXTRA = "predictions.csv", "metrics.json", "config.yaml", "kvzip_press.json"
NO_PRESS = "no_press"  # kvpress's name of the full cache
THEIR_NAMES = {"prediction": "predicted_answer", "references": "answer"}  # columns that have another name there
_IN_FILES = {"run_id", "model", "press", "compression_ratio", "query_aware", "provenance", "task"}
COLUMNS = tuple(field.name for field in fields(Row) if field.name not in _IN_FILES)
"""The fields of a row that each line of the table holds; the others hold for the whole folder, or for many lines."""


@dataclass(frozen=True)
class Folder:
    """What the name of a folder says.

    Attributes:
        dataset: The data set; here a task's name.
        data_dir: Its part, None for all of it.
        model: The model.
        press_name: The press, as kvpress would name it.
        compression_ratio: Fraction removed.
        query_aware: Whether the question was compressed with the context.
    """

    dataset: str
    data_dir: str | None
    model: str
    press_name: str
    compression_ratio: float
    query_aware: bool

    @property
    def name(self) -> str:
        """The folder's name."""
        parts = [self.dataset, self.data_dir, self.model.replace("/", "--"), self.press_name]
        ends = [f"{self.compression_ratio:.2f}", "query_aware" if self.query_aware else None]
        return "__".join(part for part in [*parts, *ends] if part)


def subset_of(row: Row) -> str:
    """What kvpress calls the task of a line: a part of the data set where the row names one, else the data set."""
    return str(row.tags.get("subset", row.task))


def column_of(name: str) -> str:
    """The column of a row's field."""
    return THEIR_NAMES.get(name, name)
