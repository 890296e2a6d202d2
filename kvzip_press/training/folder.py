"""The folder of one training: marked as its own, held by one process, and cleared of what the training made only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.files import replacing, sweep_temporaries
from kvzip_press.locks import Lock
from kvzip_press.untrusted import parse_json, read_text

MARKER, LOCK, RECORD = "kvzip-press-gates.json", ".kvzip-press-gates.lock", "training.json"
_KIND = "folder of a training of gates"
_MADE = re.compile(r"training\.json|state-\d{3,}\.safetensors|" + re.escape(MARKER))  # in the folder itself
_MADE_IN = {  # folders that a training makes, and what it makes in them
    re.compile(r"round-\d{3,}"): re.compile(r"done\.json|(hidden|scores)-\d{3,}\.bin"),
    re.compile(r"sampled"): re.compile(r"batch-\d{5,}\.json"),
}
logger = logging.getLogger(__name__)


class WorkFolder:
    """A folder in which one training keeps what is under way.

    Args:
        path: The folder. It is new, empty, or bears this training's marker; no other is taken, and no link to one.
        run: The training's name, which the marker holds.
    """

    def __init__(self, path: Path, run: str = "") -> None:
        self.path, self.run = path, run
        self._lock = Lock(path / LOCK, f"the training in {path}")
        self._to_remove: list[Path] = []

    @classmethod
    def inside(cls, parent: Path, out: Path) -> WorkFolder:
        """The folder in ``parent`` of the training that writes ``out``: the same again for the same output."""
        run = hashlib.sha256(os.fsencode(out.parent.resolve() / out.name)).hexdigest()[:12]
        return cls(parent / f"kvzip-press-gates-{run}", run)

    @contextmanager
    def held(self) -> Iterator[WorkFolder]:
        """Makes and marks the folder if it is new, and holds its lock. May be entered again inside.

        Raises:
            RunDirectoryError: The folder is not this training's, is in use by another process, or cannot be written.
        """
        if self._lock.held:
            yield self
            return
        with _as_run_error(self.path):
            n_parents = _make(self.path)
            self._check_place()  # before anything is written, even a lock
        with self._lock:
            with _as_run_error(self.path):
                self._check_place()
                self._mark(n_parents)
                for folder in (self.path, *self._subfolders()):
                    sweep_temporaries(folder)
            yield self
        for folder in self._to_remove:
            with suppress(OSError):  # something else is in it
                folder.rmdir()

    def check(self) -> None:
        """Raises if another process may have taken the folder.

        Raises:
            RunDirectoryError: The lock was removed or replaced.
        """
        self._lock.check()

    def claim(self, training: Mapping[str, str]) -> None:
        """Records which training the folder holds, or checks that the existing record is the same.

        Args:
            training: What the training depends on, in words.

        Raises:
            InvalidArgumentError: The folder holds a training of other data, another model or another recipe.
            RunDirectoryError: The record cannot be read.
        """
        path = self.path / RECORD
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(dict(training), indent=1), encoding="utf-8")
            return
        try:
            known = parse_json(read_text(path))
            differing = sorted(key for key in {*known, *training} if known.get(key) != training.get(key))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise RunDirectoryError(
                f"expected the record of a training at {path}, got {type(error).__name__}: {error}; remove that file "
                "if it is of this training, or name another folder"
            ) from error
        if differing:
            raise InvalidArgumentError(
                f"expected {self.path} to be new or to hold this training, got one of other {differing}: "
                "name another folder, or remove it"
            )

    def clear(self, folder: Path) -> None:
        """Removes what the training made in one of its folders, and the folder if nothing else is in it.

        Raises:
            RunDirectoryError: The lock was removed or replaced.
        """
        self.check()
        if folder in self._subfolders():
            (made,) = (files for name, files in _MADE_IN.items() if name.fullmatch(folder.name))
            _remove_files(folder, made)
            with suppress(OSError):  # something else is in it
                folder.rmdir()

    def remove(self) -> None:
        """Removes what the training made; once the lock is released, also the folders that it made, if nothing is left.

        Raises:
            RunDirectoryError: The folder was taken by another process.
        """
        self.check()
        self._to_remove = [self.path, *list(self.path.parents)[: self._marked()["parents"]]]
        for folder in self._subfolders():
            self.clear(folder)
        _remove_files(self.path, _MADE)
        if left := sorted(one.name for one in self.path.iterdir() if one.name != LOCK):
            logger.warning("%s stays: this training did not make %s in it", self.path, left[:3])

    def _subfolders(self) -> list[Path]:
        folders = (one for one in self.path.iterdir() if any(name.fullmatch(one.name) for name in _MADE_IN))
        return sorted(one for one in folders if one.is_dir() and not one.is_symlink())

    def _check_place(self) -> None:
        """Raises unless the place is a folder, and this training's or empty."""
        if self.path.is_symlink() or not self.path.is_dir():
            raise RunDirectoryError(f"expected a folder at {self.path}, got a link or a file: name another folder")
        if (self.path / MARKER).exists():
            self._marked()
        elif others := sorted(one.name for one in self.path.iterdir() if not one.name.startswith(".kvzip-press-")):
            raise RunDirectoryError(
                f"expected {self.path} to be new, empty or of this training, got a folder with {others[:3]} and "
                f"without {MARKER}: name another folder"
            )

    def _marked(self) -> dict[str, Any]:
        expected = f"expected {MARKER} in {self.path} to name the training {self.run!r}"
        advice = "name another folder, or remove that one if it holds nothing that you need"
        try:
            marker = parse_json(read_text(self.path / MARKER, max_bytes=2**16))
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{expected}, got {type(error).__name__}: {error}; {advice}") from error
        known = {"kind": _KIND, "run": self.run}
        parents = marker.get("parents") if isinstance(marker, dict) else None
        if type(parents) is not int or parents < 0 or marker != {**known, "parents": parents}:
            raise RunDirectoryError(f"{expected}, got {str(marker)[:200]}; {advice}")
        return dict(marker)

    def _mark(self, n_parents: int) -> None:
        if not (self.path / MARKER).exists():
            with replacing(self.path / MARKER) as temporary:
                marker = {"kind": _KIND, "run": self.run, "parents": n_parents}
                temporary.write_text(json.dumps(marker, indent=1), encoding="utf-8")


def _make(path: Path) -> int:
    """Makes a folder where there is none, and returns how many of its parents were made for it."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return max(len(missing) - 1, 0)


def _remove_files(folder: Path, made: re.Pattern[str]) -> None:
    """Removes regular files by their names, and temporaries of ours; links and all else stay."""
    sweep_temporaries(folder)
    for path in folder.iterdir():
        if made.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


@contextmanager
def _as_run_error(path: Path) -> Iterator[None]:
    try:
        yield
    except KVzipPressError:
        raise
    except OSError as error:
        raise RunDirectoryError(f"expected to write to {path}, got {error}") from error
