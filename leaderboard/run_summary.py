"""The summary of a run in one file, from which anyone who has the run can tell that nothing in it was changed.

It holds hashes of the configuration and of all rows, and the accuracies that follow from them. `verify` computes all of
it again, and each row's score from what the model said. The hashes are no signature with a key: they tie a figure that
is quoted to the rows behind it, and whoever publishes the file beside the figure cannot change one without the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.files import digest_of, replacing, to_json
from kvzip_press.leaderboard.analysis.summary import split_tables, summarise
from kvzip_press.leaderboard.rows.results import Row, run_id
from kvzip_press.leaderboard.rows.sealed_line import SealedLine
from kvzip_press.leaderboard.run_files import incomplete, rows_of
from kvzip_press.leaderboard.running.grid import grid_names, load_grid
from kvzip_press.leaderboard.running.plan import ANSWER
from kvzip_press.leaderboard.running.run_directory import RUN, RunRecord
from kvzip_press.leaderboard.samples.task import Question, Task, version_of
from kvzip_press.leaderboard.tasks import TASKS, get_task
from kvzip_press.untrusted import JSON_BYTES, read_bytes

_DEFAULTS = {
    one.name: one.default if one.default_factory is MISSING else one.default_factory()
    for one in fields(Row)
    if one.default is not MISSING or one.default_factory is not MISSING
}
_SAME = 1e-9
_SHOWN = 3


@dataclass(frozen=True)
class RunSummary(SealedLine):
    """What a summary file says.

    Attributes:
        run_id: The run's.
        model: The model's name.
        config_sha256: Hash of the whole configuration; None of rows without a record, whose configuration nobody knows.
        rows_sha256: Hash of all rows, sorted, so that shards may be joined in any order. Fields that a row has by
            default do not count, so that those of later versions change nothing.
        n_rows: Number of rows.
        accuracies: ``press @ removed fraction`` -> accuracy, as tables show it; of rows that follow the full cache the
            share of next tokens, under that name and ``, agreement``, and their divergence under ``, KL in nats``.
        n_questions: The same -> how many questions that is the mean of.
        provenance: What the run depends on besides its configuration.
    """

    kind: ClassVar[str] = "the summary of a run"

    run_id: str
    model: str
    config_sha256: str | None
    rows_sha256: str
    n_rows: int
    accuracies: Mapping[str, float]
    n_questions: Mapping[str, int]
    provenance: Mapping[str, str]

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> RunSummary:
        """Makes the summary of a run, or of rows without a record (``run.json``).

        Raises:
            RunDirectoryError: There are no rows, the record is broken, a part of the run is missing, or there are rows
                of another.
            InvalidArgumentError: A row is damaged.
        """
        return _summary_of(directory, rows_of(directory), _record_of(directory))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, whole or not at all."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(self.to_line(indent=1) + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunSummary:
        """Reads a file.

        Raises:
            InvalidArgumentError: It cannot be read, is no summary, or was changed.
        """
        expected = f"expected {path} to be what `kvzip-press leaderboard summary` wrote"
        try:
            found, has_seal = cls.from_line(read_bytes(path, max_bytes=JSON_BYTES))
        except OSError as error:
            raise InvalidArgumentError(f"{expected}, got a file that cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InvalidArgumentError(f"{expected}, got another file: {error}") from error
        if not has_seal:
            raise InvalidArgumentError(f"{expected}, got one without its seal: it was changed after it was written")
        return found


def _summary_of(directory: str | os.PathLike[str], rows: Sequence[Row], record: RunRecord | None) -> RunSummary:
    if note := incomplete(directory, rows):
        raise RunDirectoryError(f"expected a whole run in {directory}, got {note}: go on with it first")
    if not rows:
        raise RunDirectoryError(f"expected a run with rows in {directory}, got none")
    figures, counts = _figures(rows)
    return RunSummary(
        run_id=rows[0].run_id if record is None else record.run_id,
        model=rows[0].model,
        config_sha256=None if record is None else digest_of(to_json(record.config).encode()),
        rows_sha256=_digest_of_rows(rows),
        n_rows=len(rows),
        accuracies=figures,
        n_questions=counts,
        provenance={} if record is None else record.provenance,
    )


def verify(directory: str | os.PathLike[str], file: str | os.PathLike[str]) -> str:
    """Computes a summary again from a run, and each row's score from its prediction.

    Of rows without a record it cannot be told which run they are of, whether they are all of it, and with which options
    their tasks asked. Then scores are those of the tasks of the same names, and what is returned says so.

    Returns:
        Sentences about what was found to be so, and what could not be checked.

    Raises:
        InvalidArgumentError: The file is no summary, something is not as it says, or a score is not that of its
            prediction.
        RunDirectoryError: The run cannot be read, or is not whole.
    """
    said, rows, record = RunSummary.load(file), rows_of(directory), _record_of(directory)
    found = _summary_of(directory, rows, record)
    differing = [
        one.name for one in fields(RunSummary) if not _equal(getattr(said, one.name), getattr(found, one.name))
    ]
    if differing:
        cells = [name for name in said.accuracies if not _equal(said.accuracies[name], found.accuracies.get(name))]
        about = f", in {', '.join(map(repr, cells[:_SHOWN]))}{' and others' * (len(cells) > _SHOWN)}" if cells else ""
        raise InvalidArgumentError(
            f"expected the run in {directory} to be that of {file}, got another: {', '.join(differing)} differ{about}"
        )
    config, grid = (record.config, "") if record is not None else _grid_of(found.run_id)
    tasks = {row.task: _task_named(row.task) for row in rows} if config is None else _tasks(config)
    n_scored = _check_scores(rows, tasks)
    n_followed = sum(row.follows_full_cache for row in rows)
    unscored = found.n_rows - n_scored - n_followed
    left = f"; of {unscored} the metric is not known here" if unscored else ""
    left += f"; {n_followed} are of agreement, which predictions do not tell" if n_followed else ""
    what = "rows" if record is None else f"rows and the configuration {found.run_id}"
    return (
        f"{found.n_rows} {what} are those of {file}; {n_scored} scores follow from their predictions{left}; "
        f"{len(found.accuracies)} accuracies follow from the rows{_unknown(record, found.run_id, grid)}"
    )


def _unknown(record: RunRecord | None, known: str, grid: str) -> str:
    """Says what cannot be checked of rows without a record."""
    if record is not None:
        return ""
    if grid:
        return (
            f". There is no run.json: {known} is the configuration of the grid {grid!r}, but whether these are all of "
            "its rows, and with which versions they were made, cannot be checked"
        )
    return (
        ". There is no run.json: with which configuration and versions these rows were made, whether they are all of a "
        "run, and whether its tasks had other options than those of their names, cannot be checked"
    )


def _grid_of(known: str) -> tuple[Mapping[str, Any] | None, str]:
    """Returns the configuration of the grid of this package that has an id, and its name; None and "" if none has."""
    for name in grid_names():
        with suppress(KVzipPressError):  # of a grid whose tasks' package is absent
            config = _config_of(name)
            if run_id(config) == known:
                return config, name
    return None, ""


@cache
def _config_of(grid: str) -> Mapping[str, Any]:
    return load_grid(grid).run.config  # some grids read their tasks' texts, for seconds


def _record_of(directory: str | os.PathLike[str]) -> RunRecord | None:
    return RunRecord.read(directory) if os.path.lexists(Path(directory) / RUN) else None


def _figures(rows: Iterable[Row]) -> tuple[dict[str, float], dict[str, int]]:
    """Returns the figures of all tables of a run by name, and how many questions they are means of."""
    figures, counts = dict[str, float](), dict[str, int]()
    for table in split_tables(rows):
        for cell in summarise(table):
            name = f"{cell.press} @ {cell.compression_ratio:g}"
            if cell.kl is not None:
                figures[f"{name}, KL in nats"], counts[f"{name}, KL in nats"] = cell.kl, cell.n_questions
                name = f"{name}, agreement"
            figures[name], counts[name] = cell.accuracy, cell.n_questions
    return figures, counts


def _equal(said: Any, found: Any) -> bool:
    if isinstance(said, Mapping) and isinstance(found, Mapping):
        return said.keys() == found.keys() and all(_equal(value, found[key]) for key, value in said.items())
    if isinstance(said, float) and isinstance(found, float):
        return abs(said - found) <= _SAME
    return bool(said == found)


def _digest_of_rows(rows: Iterable[Row]) -> str:
    return digest_of("\n".join(sorted(map(_text_of, rows))).encode("utf-8", "surrogatepass"))


def _text_of(row: Row) -> str:
    values = {name: value for name, value in vars(row).items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
    return to_json(values)


def _check_scores(rows: Sequence[Row], tasks: Mapping[str, Task | None]) -> int:
    """Returns how many rows were scored again; raises InvalidArgumentError for one whose score is another."""
    count = 0
    for row in rows:
        task = tasks.get(row.task)
        if task is None or version_of(task) != row.task_version or row.follows_full_cache:
            continue  # how closely the full cache was followed does not follow from a text
        again = task.score(row.prediction, Question(row.question_id, row.question, row.references, tags=row.tags))
        if abs(again - row.score) > _SAME:
            raise InvalidArgumentError(
                f"expected the score {again:g} of the prediction {row.prediction!r:.60} (task {row.task!r:.60}, sample "
                f"{row.sample_id!r:.40}, press {row.press!r:.60}), got {row.score:g}"
            )
        count += 1
    return count


def _tasks(config: Mapping[str, Any]) -> dict[str, Task | None]:
    return dict(map(_task_of, config.get("tasks", ())))


def _task_named(name: str) -> Task | None:
    return get_task(name) if name in TASKS else None


def _task_of(entry: Mapping[str, Any]) -> tuple[str, Task | None]:
    """Returns a task's name in a run and the task as it was configured; None if this version does not have it.

    Nor is there one that scores rows that follow the full cache: their score is of probabilities, not of a prediction.
    """
    options, kind = dict(entry["task"]), entry["kind"]
    name = str(options.pop("name", ""))
    if entry.get("measure", ANSWER) != ANSWER:
        return name, None
    names = [known for known, target in TASKS.items() if target.endswith(f":{kind}")]
    if name not in names and len(names) != 1:
        return name, None  # several tasks share a class and take their part from their name, which a grid replaced
    try:
        task: Any = get_task(name if name in names else names[0], **options)
        return name, replace(task, name=name)
    except KVzipPressError:
        return name, None
