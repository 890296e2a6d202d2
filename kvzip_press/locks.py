"""Locks between processes, which go with the process that holds them, however it ends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, SoftFileLock, Timeout

from kvzip_press.errors import RunDirectoryError

_ATTEMPTS = 5


class Lock:
    """A lock on a file, taken without waiting. A context manager; the same object may be entered again inside.

    The file is empty and goes with the lock; one that a killed process left locks nobody out. Someone may remove it
    meanwhile, and the next process would lock a new file in its place: whoever holds a lock calls :meth:`check` before
    each step that two must not do.

    Args:
        path: The file. A link is not followed.
        what: What is locked, for the error: ``"the training in out.work"``.

    Raises:
        RunDirectoryError: On entering: another process holds the lock, or the file cannot be written.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._lock = FileLock(path, blocking=False)
        self._identity: tuple[int, int] | None = None
        self._depth = 0

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._depth > 0

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._take()
        else:
            self.check()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            with suppress(OSError):  # Windows removes no open file: there it stays
                if self._of_path() == self._identity and self.path.lstat().st_size == 0:
                    self.path.unlink()
            self._lock.release()

    def check(self) -> None:
        """Raises if the locked file is no longer the one at the path.

        Raises:
            RunDirectoryError: The file was removed or replaced, so that another process may have begun.
        """
        if self._of_path() != self._identity:
            raise RunDirectoryError(
                f"expected {self.path} to stay while this process works on {self.what}, but it was removed or "
                "replaced, and another process may have begun: stopped before anything else is written. Start again"
            )

    def _take(self) -> None:
        """Locks the file that is at the path; that it was there before and is there afterwards shows that it is."""
        for _ in range(_ATTEMPTS):  # a file that is new, or that its holder removes just now, takes a second one
            self._check_empty()
            before = self._of_path()
            try:
                self._lock.acquire()
            except Timeout as error:
                raise RunDirectoryError(
                    f"expected to be alone with {self.what}, but another process holds {self.path}: wait until it ends"
                ) from error
            except OSError as error:
                raise RunDirectoryError(f"expected to lock {self.what} by {self.path}, got {error}") from error
            self._identity = self._of_path()
            if before is not None and before == self._identity:
                return
            if isinstance(self._lock, SoftFileLock):  # where files cannot be locked, to have made the file is the lock
                return
            self._lock.release()
        raise RunDirectoryError(f"expected {self.path} to be a file that stays, got one that is replaced all the time")

    def _check_empty(self) -> None:
        """Raises for a file with contents before it is locked: older releases of filelock empty what they lock."""
        if self.path.is_file() and not self.path.is_symlink() and self.path.stat().st_size > 0:
            raise RunDirectoryError(
                f"expected an empty file or none at {self.path}, to lock {self.what}, got one with contents: a process "
                "holds it where files cannot be locked, or it is not ours. Remove it if neither is so"
            )

    def _of_path(self) -> tuple[int, int] | None:
        try:
            status = self.path.lstat()
        except OSError:
            return None
        return status.st_dev, status.st_ino
