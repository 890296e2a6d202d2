"""Files of sealed lines: written a line at a time by one process, and read with every damage named."""

import errno
import itertools
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import IO, Generic, Self, TypeVar

from kvzip_press.errors import InvalidArgumentError, RunDirectoryError
from kvzip_press.files import lock_file
from kvzip_press.leaderboard.rows.sealed_line import SEAL, SealedLine
from kvzip_press.untrusted import JSON_BYTES

logger = logging.getLogger(__name__)

L = TypeVar("L", bound=SealedLine)

_BINARY = getattr(os, "O_BINARY", 0)
_NOT_A_LINK = getattr(os, "O_NOFOLLOW", 0)
_NOT_WAITING = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for its other end
_BLOCK = 2**16


class LineWriter(Generic[L]):
    """Appends lines to a file; when `write` returns, the line is on disk. Use it as a context manager.

    The file is locked, so that a second writer is refused whatever became of other locks. An incomplete line at its
    end, as a killed process leaves it, is cut off first, with a warning; an end that no line of ours begins with is an
    error, as is a link: what lies there was not written by this class.

    Args:
        path: The file; it and its directory are created if they do not exist.
        kind: The class of the lines.

    Raises:
        RunDirectoryError: On entering: it cannot be written, is no regular file, ends with something else, or another
            process writes to it.
    """

    def __init__(self, path: str | os.PathLike[str], kind: type[L]) -> None:
        self._path, self._kind = Path(path), kind
        self._file: IO[bytes] | None = None
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._opened()
            self._cut_half_a_line(self._file)
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, OSError) and not isinstance(error, RunDirectoryError):
                raise RunDirectoryError(f"expected to write to {self._path}, got {error}") from error
            raise
        return self

    def write(self, line: L) -> None:
        """Appends one line.

        Raises:
            RunDirectoryError: The write failed, for example on a full disk, and the file ends with the line before; or
                the file was removed or replaced in the meantime.
        """
        assert self._file is not None, "use LineWriter in a with statement"
        self._check_still_there()
        whole = self._file.seek(0, os.SEEK_END)
        try:
            _write_all(self._file, line.to_line().encode() + b"\n")
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

    def _opened(self) -> IO[bytes]:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _BINARY | _NOT_A_LINK | _NOT_WAITING
        try:
            descriptor = os.open(self._path, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RunDirectoryError(
                    f"expected {self._path} to be a file of its own, got a link: what it leads to is left as it is"
                ) from error
            raise
        file = os.fdopen(descriptor, "a+b", buffering=0)  # a buffer would write the rest of a failed write later
        try:
            self._identity = self._checked(descriptor)
        except BaseException:
            file.close()
            raise
        return file

    def _checked(self, descriptor: int) -> tuple[int, int]:
        """Locks an open file, and returns what tells it from others of the same name."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RunDirectoryError(f"expected {self._path} to be a regular file, got a pipe or a device")
        if not lock(descriptor):
            raise RunDirectoryError(f"expected to be alone in {self._path}, but another process writes to it")
        return status.st_dev, status.st_ino

    def _cut_half_a_line(self, file: IO[bytes]) -> None:
        half, size = _behind_the_last_newline(file)
        if not half:
            return
        begin = json.dumps({fields(self._kind)[0].name: ""}).encode()[:-2]  # type: ignore[arg-type]  # a dataclass
        written = half.rstrip(b"\0")  # a power cut may leave zeros
        if not (written.startswith(begin) or begin.startswith(written)):
            raise RunDirectoryError(
                f"expected {self._path} to end with a newline, or with the beginning of {self._kind.kind}, got "
                f"{half[:40]!r}: this is left as it is. Move the file away, or end it with a newline"
            )
        logger.warning("%s ended in half a row (%d bytes), which is cut off", self._path, len(half))
        file.truncate(size - len(half))

    def _check_still_there(self) -> None:
        try:
            status = self._path.lstat()
            identity = status.st_dev, status.st_ino
        except OSError:
            identity = None
        if identity != self._identity:
            raise RunDirectoryError(
                f"expected {self._path} to stay where it is while it is written to, but it was removed or replaced"
            )


def read_lines(path: str | os.PathLike[str], kind: type[L]) -> Iterator[L]:
    """Yields the lines of a file in order. An incomplete last line is skipped with a warning.

    Lines without a seal, as older versions wrote them, are accepted before those with one, with one warning a file.

    Args:
        path: A file that `LineWriter` wrote.
        kind: The class of the lines.

    Raises:
        InvalidArgumentError: Any other line that is not of the kind, was changed, or has no seal behind lines with one;
            the message has its number.
        RunDirectoryError: The file does not exist, cannot be read, or is no regular file.
    """
    with _opened_to_read(Path(path)) as file:
        first_without: int | None = None
        has_seals = False
        for number in itertools.count(1):
            text = file.readline(JSON_BYTES + 1)
            if not text:
                return
            if not text.endswith(b"\n"):
                if len(text) > JSON_BYTES:
                    raise InvalidArgumentError(f"{path}:{number}: expected lines of at most {JSON_BYTES} bytes")
                logger.warning("%s:%d: half a row at the end is left out", path, number)
                return
            if not text.strip():
                continue
            try:
                line, has_seal = kind.from_line(text)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"{path}:{number}: {error}") from error
            if has_seals and not has_seal:
                raise InvalidArgumentError(
                    f"{path}:{number}: expected {kind.kind} with a {SEAL!r}, as in the lines before, got one without: "
                    "the line was changed or added"
                )
            if not has_seal and first_without is None:
                first_without = number
                logger.warning(
                    "%s: lines from the %d. on are of an older version, which wrote no checksum: whether they were "
                    "changed cannot be told",
                    path,
                    number,
                )
            has_seals = has_seal
            yield line


def check_not_written(path: Path) -> None:
    """Raises RunDirectoryError if another process has the file open as a `LineWriter`. It need not exist."""
    if not os.path.lexists(path):
        return
    with _opened_to_read(path) as file:
        if not lock(file.fileno()):
            raise RunDirectoryError(f"expected to be alone in {path.parent}, but another process writes to {path.name}")


def keep_aside(paths: Sequence[Path]) -> None:
    """Renames the files that exist, adding to all the first number that is free for all; all of them or none.

    Raises:
        RunDirectoryError: A file cannot be renamed.
    """
    there = [path for path in paths if os.path.lexists(path)]
    if not there:
        return
    named = ([file.with_name(f"{file.stem}.{n}{file.suffix}") for file in there] for n in itertools.count(1))
    aside = next(files for files in named if not any(map(os.path.lexists, files)))
    renamed: list[tuple[Path, Path]] = []
    try:
        for file, name in zip(there, aside, strict=True):
            file.rename(name)
            renamed.append((file, name))
    except OSError as error:
        for file, name in reversed(renamed):
            with suppress(OSError):
                name.rename(file)
        raise RunDirectoryError(f"expected to keep {there[0]} aside as {aside[0].name}, got {error}") from error
    for file, name in renamed:
        logger.warning("%s is kept aside as %s", file, name.name)


def _opened_to_read(path: Path) -> IO[bytes]:
    try:
        descriptor = os.open(path, os.O_RDONLY | _BINARY | _NOT_WAITING)
    except OSError as error:
        raise RunDirectoryError(f"expected a file that can be read, got {error}") from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise RunDirectoryError(f"expected {path} to be a regular file, got a folder, a pipe or a device")


def lock(descriptor: int) -> bool:
    """Locks an open file until it is closed. Returns False if someone else has; True, too, where there are no locks."""
    try:
        lock_file(descriptor)  # without locks (some network disks), the lock of the directory is what is left
    except BlockingIOError:
        return False
    return True


def _write_all(file: IO[bytes], line: bytes) -> None:
    """Writes a whole line: on a nearly full disk a single call may write only part of it."""
    while line:
        line = line[file.write(line) :]


def _behind_the_last_newline(file: IO[bytes]) -> tuple[bytes, int]:
    """Returns what stands behind the last newline, and the file's size; the file is read backwards, in blocks."""
    size = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start > 0 and b"\n" not in tail:
        if len(tail) > JSON_BYTES:
            raise InvalidArgumentError(f"expected lines of at most {JSON_BYTES} bytes, got a longer one at the end")
        length = min(_BLOCK, start)
        start = file.seek(start - length)
        tail = file.read(length) + tail
    return tail[tail.rfind(b"\n") + 1 :], size
