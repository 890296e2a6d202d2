"""Rows: one line of JSON per answer, on disk as soon as it is known; and functions to read and write such lines."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Protocol, Self, TypeVar

from kvzip_press.errors import InvalidArgumentError, RunDirectoryError

logger = logging.getLogger(__name__)

_Line = TypeVar("_Line")


class Line(Protocol):
    """A line of a JSONL file."""

    def to_json(self) -> str:
        """Returns one line of JSON, without the newline."""
        ...


class RowKey(NamedTuple):
    """The fields that tell the rows of one run apart."""

    task: str
    sample_id: str
    question_id: str
    press: str
    compression_ratio: float
    query_aware: bool


@dataclass(frozen=True)
class Row:
    """One answer, with everything needed to judge it. Times are wall seconds, sizes bytes of keys and values.

    Sizes, times and token counts are None in rows that were read from another program's results, which have none.

    Attributes:
        run_id: Identifies the configuration that made it, see `run_id`.
        task: The task's name.
        model: The model's name, as it was asked for.
        press: The press's label.
        compression_ratio: The fraction of pairs asked to be removed.
        kept_fraction: Pairs that are kept over pairs seen, measured on the cache that answered.
        sample_id: The context, unique inside task and seed.
        question_id: The question, unique inside its sample.
        seed: The seed that the samples were made from.
        prediction: What the model said.
        references: The accepted answers.
        score: The task's metric, in [0, 1].
        query_aware: Whether the question was known when the context was compressed; tables never mix the two.
        n_context_tokens: Tokens of the context, chat template included.
        n_answer_tokens: Tokens that were generated.
        resident_bytes: What the compressed cache holds.
        dense_bytes: What the uncompressed cache holds.
        prefill_seconds: The one forward pass over the context, shared by all presses, including those that observe it.
        score_seconds: Scoring, shared by all ratios of a press.
        evict_seconds: Making the compressed cache from the scores.
        answer_seconds: Reading the question and writing the answer; its share if several were asked at once.
        tags: What the task records about this question besides the metric, such as its depth in the context.
        provenance: Versions, device, dtype and the like.
    """

    run_id: str
    task: str
    model: str
    press: str
    compression_ratio: float
    kept_fraction: float | None
    sample_id: str
    question_id: str
    seed: int
    prediction: str
    references: tuple[str, ...]
    score: float
    query_aware: bool
    n_context_tokens: int | None
    n_answer_tokens: int | None
    resident_bytes: int | None
    dense_bytes: int | None
    prefill_seconds: float | None
    score_seconds: float | None
    evict_seconds: float | None
    answer_seconds: float | None
    tags: dict[str, float | str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> RowKey:
        """Identifies the row within its run."""
        return RowKey(*(getattr(self, name) for name in RowKey._fields))

    def to_json(self) -> str:
        """Returns the row as one line of JSON, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads the row from a line; fields that a newer version may have added are ignored.

        Raises:
            InvalidArgumentError: Not a JSON object, or fields are missing.
        """
        try:
            values: dict[str, Any] = json.loads(line)
            known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
            return cls(**{**known, "references": tuple(known["references"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidArgumentError(f"expected a row in JSON, got {line[:80]!r} ({error})") from error


class RowWriter:
    """Appends rows to a JSONL file; when `write` returns, the row is on disk. Use it as a context manager.

    An incomplete line at the end of the file, as a killed process leaves it, is cut off first, with a warning.

    Args:
        path: The file; it and its directory are created if they do not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)  # a buffer would write the rest of a failed write later
        if torn := _torn_bytes(self._path):
            logger.warning("%s ended in half a row (%d bytes), which is cut off", self._path, torn)
            self._file.truncate(self._path.stat().st_size - torn)
        return self

    def write(self, row: Line) -> None:
        """Appends one row.

        Raises:
            RunDirectoryError: The write failed, for example on a full disk. The file ends with the previous row.
        """
        assert self._file is not None, "use RowWriter in a with statement"
        whole = self._file.seek(0, os.SEEK_END)
        try:
            _write_all(self._file, row.to_json().encode() + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(whole)
            raise RunDirectoryError(
                f"expected to write a row to {self._path}, got {error}; the rows before it are on the disk, and the "
                "same command goes on behind them"
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yields the rows of a file in order, see :func:`read_lines`."""
    return read_lines(path, Row.from_json)


def read_lines(path: str | os.PathLike[str], from_json: Callable[[str], _Line]) -> Iterator[_Line]:
    """Yields the rows of a file, of any kind, in order. An incomplete last line is skipped with a warning.

    Args:
        path: A file that :class:`RowWriter` wrote.
        from_json: Reads a line; raises InvalidArgumentError if it cannot.

    Raises:
        InvalidArgumentError: Any other line that is not a row; the message has its number.
        FileNotFoundError: No such file.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                logger.warning("%s:%d: half a row at the end is left out", path, number)
            elif line.strip():
                try:
                    yield from_json(line)
                except InvalidArgumentError as error:
                    raise InvalidArgumentError(f"{path}:{number}: {error}") from error


def run_id(config: Mapping[str, Any]) -> str:
    """Names a configuration: 12 hexadecimal digits of the hash of its JSON form, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _write_all(file: IO[bytes], line: bytes) -> None:
    """Writes a whole line: on a nearly full disk a single call may write only part of it."""
    while line:
        line = line[file.write(line) :]


def _torn_bytes(path: Path) -> int:
    content = path.read_bytes()
    return len(content) - (content.rfind(b"\n") + 1)
