"""The contexts of a folder by name: what may be asked about, and what is wrong with the other files."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvzip_press.cache.file.reading import read_record
from kvzip_press.cache.file.record import CacheRecord
from kvzip_press.errors import CacheFileError, InvalidArgumentError, KVzipPressError, did_you_mean
from kvzip_press.serving.packing import check_one_context

SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ContextFile:
    """A file of a folder, as it was when the folder was last looked at.

    Attributes:
        path: Where it is.
        mark: What tells it from another file of that name: inode, size and time of its last change.
        refused: Why it cannot be asked about; empty if it can.
    """

    path: Path
    mark: tuple[int, int, int]
    refused: str = ""


class ContextFolder:
    """The files ``<name>.safetensors`` of a folder, each a cache that ``RaggedCache.save`` wrote.

    A name that is asked for is looked up among the files that are there, and never made into a path. What is wrong with
    a file keeps nobody from the others. Several threads may use a folder.

    Args:
        path: The folder.
        check: Raises an error of this package for metadata of a cache that another model made.

    Raises:
        CacheFileError: The folder cannot be read.
    """

    def __init__(self, path: str | Path, check: Callable[[CacheRecord], object]) -> None:
        self.path, self._check = Path(path), check
        self._files: dict[str, ContextFile] = {}
        self._lock = threading.Lock()
        self.refresh()

    @property
    def names(self) -> list[str]:
        """The names that can be asked about, sorted."""
        return sorted(name for name, file in self._files.items() if not file.refused)

    @property
    def refused(self) -> dict[str, str]:
        """Why the other files of the folder cannot be asked about, by name."""
        return {name: file.refused for name, file in sorted(self._files.items()) if file.refused}

    def refresh(self) -> None:
        """Looks at the folder again: at files that are new or have changed, by what they say of themselves.

        The pairs themselves are checked when a context is first asked about. Files that are gone are forgotten.

        Raises:
            CacheFileError: The folder cannot be read.
        """
        try:
            paths = sorted(path for path in self.path.iterdir() if path.name.endswith(SUFFIX))
        except OSError as error:
            raise CacheFileError(f"expected a folder of contexts, got {type(error).__name__}: {error}") from error
        with self._lock:
            self._files = {name: file for path in paths if (found := self._looked_at(path)) for name, file in [found]}

    def find(self, name: str) -> ContextFile:
        """Returns the file of a name; looks at the folder again if there is none yet, or it has changed.

        Raises:
            InvalidArgumentError: There is no context of that name, or it was refused; the message says why.
        """
        file = self._files.get(name) if isinstance(name, str) else None
        if file is None or file.mark != _mark_of(file.path):
            self.refresh()
            file = self._files.get(name) if isinstance(name, str) else None
        if file is None:
            raise InvalidArgumentError(
                f"expected the name of a context, got {name!r:.80}{did_you_mean(name, self.names)}"
            )
        if file.refused:
            raise InvalidArgumentError(f"expected a context that can be read, got {name!r:.80}: {file.refused}")
        return file

    def refuse(self, name: str, file: ContextFile, reason: Exception) -> None:
        """Notes why a file could not be read, until it changes."""
        with self._lock:
            if self._files.get(name) == file:
                self._files[name] = ContextFile(file.path, file.mark, _without_path(reason, file.path))

    def _looked_at(self, path: Path) -> tuple[str, ContextFile] | None:
        name = path.name.removesuffix(SUFFIX)
        mark = _mark_of(path)
        if mark is None:
            return None
        known = self._files.get(name)
        if known is not None and known.mark == mark:
            return name, known
        reason = self._reason_against(name, path)
        if reason:
            logger.warning("context %r cannot be asked about: %s", name, reason)
        return name, ContextFile(path, mark, reason)

    def _reason_against(self, name: str, path: Path) -> str:
        try:
            check_name(name)
            record = read_record(path)
            self._check(record)
            n_ragged = sum(layer.kind == "ragged" for layer in record.layers)
            check_one_context(len(record.layers), n_ragged, record.batch_size)
        except KVzipPressError as error:
            return _without_path(error, path)
        return ""


def check_name(name: str) -> None:
    """Raises InvalidArgumentError unless a name can be that of a context: none of these is a path."""
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            "expected a name of letters, digits, '.', '_' and '-', at most 128, that begins with a letter or a digit, "
            f"got {name!r:.80}"
        )


def _mark_of(path: Path) -> tuple[int, int, int] | None:
    """Returns inode, size and time of a file's last change; None if it went meanwhile, or is a link to nothing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _without_path(error: Exception, path: Path) -> str:
    """Returns an error's message without the path, which is nobody's business who only knows a name."""
    return str(error).removeprefix(f"{path}: ").replace(str(path), path.name)
