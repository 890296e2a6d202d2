"""The directory of a run: its configuration, its rows, what heads kept, and a lock."""

import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from kvzip_press.errors import KVzipPressError, RunDirectoryError
from kvzip_press.files import replacing
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets, read_heads
from kvzip_press.leaderboard.rows.results import Row, RowKey, RowWriter, read_rows
from kvzip_press.leaderboard.running.plan import Run
from kvzip_press.leaderboard.running.provenance import provenance

logger = logging.getLogger(__name__)

RUN, ROWS, HEADS, LOCK = "run.json", "rows.jsonl", "heads.jsonl", "lock"

_SAME_MODEL = ("model_revision", "dtype")  # parts of the provenance: rows of two models are not rows of one run
_SHOWN = 6  # how many differing keys an error names


@dataclass(frozen=True)
class RunRecord:
    """The contents of ``run.json``.

    Attributes:
        run_id: The hash of the configuration.
        config: The whole configuration.
        provenance: What the run depends on besides its configuration, recorded where it was begun.
        n_rows: How many rows the whole run has, all shards together.
    """

    run_id: str
    config: Mapping[str, Any]
    provenance: Mapping[str, str]
    n_rows: int

    @classmethod
    def of(cls, run: Run, model: Any, n_rows: int) -> Self:
        """Makes the record of a run that begins."""
        return cls(run.run_id, run.config, provenance(model), n_rows)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the record of a run directory.

        Raises:
            RunDirectoryError: There is no record, or it cannot be read.
        """
        file = Path(path) / RUN
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
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


class RunDirectory:
    """Appends to the directory of a run, continuing where it stopped. A context manager, which holds the lock.

    A second process is refused. The lock is the operating system's, so a killed process leaves none behind.

    Args:
        path: The directory; created if it does not exist.
        record: The run.
        force: Whether to begin again; existing files are renamed, with a number in their names.

    Attributes:
        done: Keys of the rows that are already there.

    Raises:
        RunDirectoryError: On entering: the directory is in use, of another configuration or model, damaged, or not
            writable.
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
                self._begin()
                self._rows = stack.enter_context(RowWriter(self.path / ROWS))
                self._heads = stack.enter_context(RowWriter(self.path / HEADS))
            except KVzipPressError:
                raise
            except OSError as error:
                raise RunDirectoryError(f"expected to write to {self.path}, got {error}") from error
            self.done = {row.key for row in read_rows(self.path / ROWS)}
            self._heads_done = {heads.key for heads in read_heads(self.path / HEADS)}
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

    def _begin(self) -> None:
        """Checks that an existing run is this one, or begins a new one."""
        file = self.path / RUN
        if self.force:
            _keep_aside(self.path)
        if file.exists():
            there = RunRecord.read(self.path)
            if differences := there.differences(self.record):
                raise RunDirectoryError(
                    f"{self.path} holds another run, {there.run_id}. It and this one, {self.record.run_id}, differ in "
                    f"{_listed(differences)}. Take another directory, or --force to begin again"
                )
            return
        if (self.path / ROWS).exists():
            raise RunDirectoryError(f"{self.path} holds {ROWS} without {RUN}: of which run? --force keeps it aside")
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(asdict(self.record), indent=1) + "\n", encoding="utf-8")


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


def _keep_aside(path: Path) -> None:
    """Renames the existing files, adding the first number that is free for all of them."""
    there = [path / name for name in (RUN, ROWS, HEADS) if (path / name).exists()]
    named = ([file.with_name(f"{file.stem}.{n}{file.suffix}") for file in there] for n in itertools.count(1))
    aside = next(files for files in named if not any(file.exists() for file in files))
    for file, name in zip(there, aside, strict=True):
        file.rename(name)
        logger.warning("%s is kept aside as %s", file, name.name)
