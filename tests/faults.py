"""Faults of a disk, injected: the n-th call by which a program changes files fails, for every n.

for fault, error in every_fault(lambda: cache.save(path)):
    ...  # what the program left behind after `fault`, and the exception that it raised (None in the last round)
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_CALLS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "chmod", "write", "truncate", "ftruncate")
FULL = OSError(errno.ENOSPC, "No space left on device")
FORBIDDEN = PermissionError(errno.EACCES, "Permission denied")
TORN = OSError(errno.EIO, "Input/output error")


class _Counter:
    def __init__(self, n: int, error: OSError) -> None:
        self.left, self.error, self.fault = n, error, ""

    def due(self, call: str) -> bool:
        """Counts a call; returns whether it is the one that fails."""
        self.left -= 1
        if self.left == -1:
            self.fault = call
        return self.left == -1


class _File:
    """An open file whose writes count; one that fails has written the first half, as a disk does that fills up."""

    def __init__(self, file: Any, counter: _Counter) -> None:
        self._file, self._counter = file, counter

    def write(self, data: Any) -> int:
        if self._counter.due("write to a file"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise self._counter.error
        return int(self._file.write(data))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing(n: int, error: OSError = FULL) -> Iterator[_Counter]:
    """Lets the n-th call (from 0) fail that opens a file, writes, renames, removes or flushes; once.

    A call that fails changes nothing, except that a write has written half. Reading is not counted, nor what libraries
    write that are not Python's.
    """
    counter = _Counter(n, error)

    def fails(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if counter.due(f"os.{name}"):
                raise error
            return function(*arguments, **options)

        return call

    def opens(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *arguments, **options)
        if counter.due(f"open({mode})"):
            raise error
        return _File(real_open(file, mode, *arguments, **options), counter)

    real_open = io.open
    with pytest.MonkeyPatch.context() as patched:
        for name in _CALLS:
            patched.setattr(os, name, fails(name, getattr(os, name)))
        patched.setattr(io, "open", opens)
        patched.setattr(builtins, "open", opens)
        yield counter


def every_fault(act: Callable[[], object], error: OSError = FULL) -> Iterator[tuple[str, Exception | None]]:
    """Acts again and again, with a later call failing each time, until none fails.

    Yields the call that failed ("" in the last round, where none did) and what ``act`` raised, if it did.
    """
    for n in range(10_000):
        raised: Exception | None = None
        with failing(n, error) as counter:
            try:
                act()
            except Exception as caught:  # noqa: BLE001  # the test says which it should have been
                raised = caught
        yield counter.fault, raised
        if not counter.fault:
            return
    raise AssertionError("expected an end of the calls that can fail, got 10,000 of them")
