"""Base classes of tasks whose data are on the hub."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.samples.hub import COMMIT, HubFiles, fetch, file_revision, load_rows, matching
from kvzip_press.leaderboard.samples.record import Record, Records
from kvzip_press.leaderboard.samples.task import Presets, Question, Sample, TokenCounter, approximate_tokens


@dataclass(frozen=True)
class HubData(ABC):
    """Rows that are loaded when they are first needed.

    Attributes:
        source: A local file with the same columns to use instead, ``.parquet`` or ``.jsonl``.
        revision: Commit, tag or branch on the hub; tasks set a commit by default if one is on record. A tag or branch
            is resolved to a commit when the task is first used; `data_revision` gives that commit.
    """

    presets: ClassVar[Presets] = {"default": {}}

    source: str = ""
    revision: str = "main"
    name: str = ""

    @property
    @abstractmethod
    def files(self) -> HubFiles:
        """The files on the hub."""

    @property
    def data_revision(self) -> str:
        """The commit on the hub, or the hash of the local file.

        Raises:
            DataNotFoundError: The file does not exist; or the hub is out of reach and the data are not in the cache.
        """
        if self.source:
            return file_revision(Path(self.source))
        return self.revision if COMMIT.fullmatch(self.revision) else self._folder.name

    @cached_property
    def rows(self) -> Records:
        """All rows. Raises as `load_rows` does."""
        paths = [Path(self.source)] if self.source else matching(self._folder, self.files.pattern)
        return Records(self.source or self.files.repo_id, load_rows(paths, self.files.columns))

    @cached_property
    def _folder(self) -> Path:
        return fetch(self.files, self.revision)

    @abstractmethod
    def score(self, prediction: str, question: Question) -> float:
        """Returns how right an answer is, in [0, 1]."""


@dataclass(frozen=True)
class HubTask(HubData, ABC):
    """Makes a sample of each row, or of a group of them.

    Attributes:
        in_order: Whether contexts come in the order of the data set; otherwise a seed shuffles them.
    """

    in_order: bool = False

    def samples(
        self, *, seed: int, n: int, length_tokens: int, count_tokens: TokenCounter = approximate_tokens
    ) -> Iterator[Sample]:
        """Yields at most ``n`` samples whose contexts have at most ``length_tokens`` tokens; see `Task.samples`.

        Raises:
            InvalidArgumentError: No context is short enough.
        """
        documents = self._documents()
        order = list(range(len(documents)))
        if not self.in_order:
            Random(f"{self.name}/{seed}").shuffle(order)
        shortest, found = None, 0
        for index in order:
            if found == n:
                return
            context, questions = self._sample(documents[index])
            n_tokens = count_tokens(context)
            shortest = n_tokens if shortest is None else min(shortest, n_tokens)
            if n_tokens <= length_tokens:
                found += 1
                yield Sample(f"{index:05d}", seed, context, tuple(questions))
        if n and not found:
            raise InvalidArgumentError(
                f"expected contexts of at most {length_tokens} tokens in {self.source or self.files.repo_id} "
                f"({self.name}), got {len(documents)} whose shortest has {shortest}"
            )

    def _documents(self) -> Sequence[Sequence[Record]]:
        """Returns groups of rows that share a context; here every row is a group of its own."""
        return _Singles(self.rows)

    @abstractmethod
    def _sample(self, rows: Sequence[Record]) -> tuple[str, Sequence[Question]]:
        """Returns the context of these rows, and the questions about it."""


def by_context(rows: Sequence[Record], column: str = "context") -> list[list[Record]]:
    """Groups rows with the same context, in the order in which the contexts first appear."""
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(row.text(column), []).append(row)
    return list(groups.values())


@dataclass(frozen=True)
class _Singles(Sequence[Sequence[Record]]):
    """Each row as a group of its own, read only when asked for: rows of long-context data sets take megabytes."""

    rows: Sequence[Record]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return [self.rows[index]]
