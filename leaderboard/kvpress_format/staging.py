"""New folders that appear all at once, and whole, or not at all."""

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kvzip_press.errors import KVzipPressError, RunDirectoryError
from kvzip_press.files import without_temporaries
from kvzip_press.leaderboard.kvpress_format.layout import CONFIG, EXTRA, METRICS, PREDICTIONS
from kvzip_press.leaderboard.rows.line_file import lock

_UNFINISHED = re.compile(r"\.kvzip-press-\d+-[0-9a-f]{16}\.part")


@contextmanager
def new_folders(folder: Path) -> Iterator[Path]:
    """Yields an empty folder inside ``folder``, from which the folders that are made move there at the end.

    After an error, none has moved and nothing is left behind. What a killed process left is removed first: the folder
    is locked as long as its process lives. ``folder`` is created if it does not exist.

    Raises:
        RunDirectoryError: Something cannot be written, or a folder of that name is there.
    """
    is_new = not os.path.lexists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        unfinished = folder / f".kvzip-press-{os.getpid()}-{secrets.token_hex(8)}.part"
        unfinished.mkdir()
        try:
            with _locked(unfinished):
                yield unfinished
                _move_all(unfinished, folder)
        finally:
            _remove(unfinished)
    except BaseException as error:
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()
        if isinstance(error, OSError) and not isinstance(error, KVzipPressError):
            raise RunDirectoryError(
                f"expected to write folders into {folder}, got {without_temporaries(error, _UNFINISHED)}; none of them "
                "was written"
            ) from error
        raise


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Makes a folder with the given files, which are on the disk when it returns. The one around it must be there."""
    path.mkdir()
    for name, data in files.items():
        with (path / name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def is_unfinished(path: Path) -> bool:
    """Returns whether a path lies in a folder that is not finished."""
    return any(_UNFINISHED.fullmatch(part) for part in path.parts)


def _move_all(unfinished: Path, folder: Path) -> None:
    moved: list[tuple[Path, Path]] = []
    try:
        for path in sorted(unfinished.iterdir()):
            target = path.rename(folder / path.name)  # an error if a folder is there that holds something
            moved.append((path, target))
    except BaseException:
        for path, target in reversed(moved):
            with suppress(OSError):
                target.rename(path)
        raise


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with suppress(OSError), _locked(path):  # OSError: a living process has it
                _remove(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, where folders can be opened. Raises OSError if someone else has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        yield
        return
    try:
        if not lock(descriptor):
            raise BlockingIOError(f"another process writes to {folder}")
        yield
    finally:
        os.close(descriptor)


def _remove(unfinished: Path) -> None:
    """Removes what `write_folder` makes of a format's files, and nothing else."""
    with suppress(OSError):
        for path in unfinished.iterdir():
            _remove_files(path)
        unfinished.rmdir()


def _remove_files(folder: Path) -> None:
    for name in (PREDICTIONS, METRICS, EXTRA, CONFIG):
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name.isdecimal() and path.is_dir() and not path.is_symlink():  # a folder of the same name
            _remove_files(path)
    folder.rmdir()
