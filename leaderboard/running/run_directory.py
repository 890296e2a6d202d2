"""The directory of a run: its configuration, its rows, what heads kept, and a lock."""

import logging
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from filelock import FileLock, Timeout

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.files import replacing, sweep_temporaries
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.line_file import LineWriter, check_not_written, keep_aside, read_lines
from kvzip_press.leaderboard.rows.results import Row, RowKey, run_id
from kvzip_press.leaderboard.rows.sealed_line import SealedLine
from kvzip_press.leaderboard.running.plan import Run
from kvzip_press.leaderboard.running.provenance import provenance
from kvzip_press.untrusted import JSON_BYTES, read_bytes

OfRun = TypeVar("OfRun", Row, HeadBudgets)

RUN, ROWS, HEADS, LOCK = "run.json", "rows.jsonl", "heads.jsonl", "lock"

logger = logging.getLogger(__name__)

_SAME_MODEL = ("model_revision", "dtype")  # parts of the provenance: rows of two models are not rows of one run
_SHOWN = 6  # how many differing keys an error names


@dataclass(frozen=True)
class RunRecord(SealedLine):
    """The contents of ``run.json``.

    Attributes:
        run_id: The hash of the configuration.
        config: The whole configuration.
        provenance: What the run depends on besides its configuration, recorded where it was begun.
        n_rows: How many rows the whole run has, all shards together.

    Raises:
        InvalidArgumentError: A field is of another type.
    """

    kind: ClassVar[str] = "the record of a run"

    run_id: str
    config: Mapping[str, Any]
    provenance: Mapping[str, str]
    n_rows: int

    def check(self) -> None:
        """Raises InvalidArgumentError for a configuration of another hash, or a negative number of rows."""
        if (found := run_id(self.config)) != self.run_id:
            raise InvalidArgumentError(f"expected {self.kind} with the configuration {self.run_id!r:.40}, got {found}")
        if self.n_rows < 0:
            raise InvalidArgumentError(f"expected {self.kind} with n_rows of at least 0, got {self.n_rows}")

    @classmethod
    def of(cls, run: Run, model: Any, n_rows: int) -> Self:
        """Makes the record of a run that begins."""
        return cls(run.run_id, run.config, provenance(model), n_rows)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the record of a run directory.

        Raises:
            RunDirectoryError: There is no record, or it cannot be read, or was changed.
        """
        file = Path(path) / RUN
        try:
            return cls.from_line(read_bytes(file, max_bytes=JSON_BYTES))[0]
        except (OSError, ValueError) as error:
            raise RunDirectoryError(
                f"expected the directory of a run, with {RUN} in it, got {path}: {error}"
            ) from error

    def differences(self, other: "RunRecord") -> list[str]:
        """Lists where two runs differ, as ``key: mine, theirs``, in the order of the configuration."""
        mine, theirs = (dict(_flat(record.config)) for record in (self, other))
        for name in _SAME_MODEL:
            mine[name], theirs[name] = (record.provenance.get(name) for record in (self, other))
        keys = dict.fromkeys([*mine, *theirs])
        said = [(key, *(repr(side[key]) if key in side else "nothing" for side in (mine, theirs))) for key in keys]
        return [f"{key}: {my}, {their}" for key, my, their in said if my != their]

    def added_presses(self, other: "RunRecord") -> list[str]:
        """Lists the labels of the presses that another run has besides; empty unless that is all in which they differ.

        Rows of a press depend on no other press, so those of this run are rows of the other one, too.
        """
        mine, theirs = self.config.get("presses"), other.config.get("presses")
        if not isinstance(mine, list) or not isinstance(theirs, list) or not all(press in theirs for press in mine):
            return []
        if replace(self, config={**self.config, "presses": theirs}).differences(other):
            return []
        return [press["label"] for press in theirs if press not in mine]


def lines_of(path: Path, kind: type[OfRun], record: RunRecord, *, also: str = "") -> Iterator[OfRun]:
    """Yields the rows or head budgets of a run from a file.

    Args:
        path: The file.
        kind: The class of its lines.
        record: The run.
        also: The id of a second run whose lines may be there; none if empty.

    Raises:
        RunDirectoryError: A line is of another run, or there twice; or as `read_lines` raises.
        InvalidArgumentError: As `read_lines` raises, for a damaged line.
    """
    seen: set[Hashable] = set()
    for line in read_lines(path, kind):
        about = f"task {line.task!r:.80}, sample {line.sample_id!r:.80}, press {line.press!r:.80}"
        if line.run_id not in (record.run_id, also):
            raise RunDirectoryError(
                f"expected {path} to hold lines of the run {record.run_id} only, as {RUN} beside it says, got one of "
                f"{line.run_id!r:.40} ({about}). Remove such lines, take another directory, or --force to begin again"
            )
        if line.key in seen:
            raise RunDirectoryError(
                f"expected {path} to hold each line once, got two of {about} at the compression ratio "
                f"{line.compression_ratio}. Remove one of them"
            )
        seen.add(line.key)
        yield line


class RunDirectory:
    """Appends to the directory of a run, continuing where it stopped. A context manager, which holds the lock.

    A run that has all that the directory's has, and further presses, continues it: the rows that are there become rows
    of the larger run.

    A second process is refused. Locks are the operating system's, so a killed process leaves none behind; beside the
    lock file the files of lines are locked themselves, so that removing the lock file lets nobody in. What killed
    processes left half-written is removed.

    Args:
        path: The directory; created if it does not exist.
        record: The run.
        force: Whether to begin again; existing files are renamed, with a number in their names.

    Attributes:
        done: Keys of the rows that are already there.

    Raises:
        RunDirectoryError: On entering: the directory is in use, of another configuration or model, holds rows of
            another run, is damaged, or not writable.
        InvalidArgumentError: On entering: a line of its files was damaged.
    """

    def __init__(self, path: str | os.PathLike[str], record: RunRecord, *, force: bool = False) -> None:
        self.path, self.record, self.force = Path(path), record, force
        self.done: set[RowKey] = set()
        self._heads_done: set[tuple[str, str, str, str, float]] = set()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock(stack)
                sweep_temporaries(self.path)
                self._begin()
                self.done = {row.key for row in self._there(ROWS, Row)}  # before anything is cut off
                self._heads_done = {heads.key for heads in self._there(HEADS, HeadBudgets)}
                self._rows = stack.enter_context(LineWriter(self.path / ROWS, Row))
                self._heads = stack.enter_context(LineWriter(self.path / HEADS, HeadBudgets))
            except KVzipPressError:
                raise
            except OSError as error:
                raise RunDirectoryError(f"expected to write to {self.path}, got {error}") from error
            self._open = stack.pop_all()
        return self

    def write(self, row: Row) -> None:
        """Appends a row, unless it is already there.

        Raises:
            RunDirectoryError: The row cannot be written; the rows before it are on disk.
        """
        if row.key not in self.done:
            self._rows.write(row)
            self.done.add(row.key)

    def write_heads(self, heads: HeadBudgets) -> None:
        """Appends what the heads of a cache kept, unless it is already there. Raises as `write` does."""
        if heads.key not in self._heads_done:
            self._heads.write(heads)
            self._heads_done.add(heads.key)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def _take_lock(self, stack: ExitStack) -> None:
        try:
            stack.enter_context(FileLock(self.path / LOCK, blocking=False))
        except Timeout as error:
            raise RunDirectoryError(f"expected to be alone in {self.path}, but another process writes to it") from error
        for name in (ROWS, HEADS):  # someone may have removed the lock of a run that goes on
            check_not_written(self.path / name)

    def _begin(self) -> None:
        """Checks that an existing run is this one, or begins a new one."""
        file = self.path / RUN
        if self.force:
            keep_aside([self.path / name for name in (RUN, ROWS, HEADS)])
        if file.exists():
            there = RunRecord.read(self.path)
            if added := there.added_presses(self.record):
                self._take_over(there, added)
            elif differences := there.differences(self.record):
                raise RunDirectoryError(
                    f"{self.path} holds another run, {there.run_id}. It and this one, {self.record.run_id}, differ in "
                    f"{_listed(differences)}. Take another directory, or --force to begin again"
                )
            return
        if (self.path / ROWS).exists():
            raise RunDirectoryError(f"{self.path} holds {ROWS} without {RUN}: of which run? --force keeps it aside")
        self._write_record(self.record)

    def _take_over(self, there: RunRecord, added: Sequence[str]) -> None:
        """Makes the lines of the run that is there lines of this one, which has further presses.

        The record is written last: if this is killed before, the same command does it again.
        """
        self._take_lines(ROWS, Row, there)
        self._take_lines(HEADS, HeadBudgets, there)
        self._write_record(replace(self.record, provenance=there.provenance))
        logger.warning(
            "%s: the run %s goes on as %s, with %s", self.path, there.run_id, self.record.run_id, ", ".join(added)
        )

    def _take_lines(self, name: str, kind: type[OfRun], there: RunRecord) -> None:
        file, run_id = self.path / name, self.record.run_id
        if not file.exists():
            return
        with LineWriter(file, kind):  # refuses what no run wrote, as for a run that goes on as it is
            pass
        lines = [replace(line, run_id=run_id) for line in lines_of(file, kind, self.record, also=there.run_id)]
        with replacing(file) as temporary:
            temporary.write_text("".join(f"{line.to_line()}\n" for line in lines), encoding="utf-8", newline="\n")

    def _write_record(self, record: RunRecord) -> None:
        with replacing(self.path / RUN) as temporary:
            temporary.write_text(record.to_line(indent=1) + "\n", encoding="utf-8")

    def _there(self, name: str, kind: type[OfRun]) -> Iterator[OfRun]:
        file = self.path / name
        return lines_of(file, kind, self.record) if file.exists() else iter(())


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ``a.b[0] -> value`` for every leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}[{index}]")
    else:
        yield path, value


def _listed(differences: list[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
