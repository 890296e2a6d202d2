"""Loads rows of data sets from the Hugging Face hub, or of a local file with the same columns."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError, MissingDependencyError, install_command

FORMATS = {".parquet": "parquet", ".jsonl": "json"}
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set on the hub.

    Attributes:
        repo_id: The data set's name.
        pattern: The files' paths in the data set; ``*`` stands for any characters.
        columns: The columns that are read; the files may have others.
    """

    repo_id: str
    pattern: str
    columns: tuple[str, ...]


def file_revision(path: Path) -> str:
    """Returns ``sha256:`` and the first 16 digits of a file's hash.

    Raises:
        DataNotFoundError: The path is not a file.
    """
    _check_file(path)
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def fetch(files: HubFiles, revision: str) -> Path:
    """Downloads files, or without a network takes what the cache has of that revision.

    Args:
        files: The files.
        revision: Commit, tag or branch.

    Returns:
        The folder that holds the files, named after their commit.

    Raises:
        DataNotFoundError: The files are neither in the cache nor reachable. The message says what to do.
        MissingDependencyError: The package ``huggingface_hub`` is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _missing("huggingface_hub") from error
    try:
        folder = Path(
            snapshot_download(
                files.repo_id, repo_type="dataset", revision=revision, allow_patterns=files.pattern, etag_timeout=30
            )
        )
    except Exception as error:  # the hub's errors come from several HTTP libraries
        raise _not_reached(files, revision, f"{type(error).__name__}: {error}") from error
    if not matching(folder, files.pattern):
        raise _not_reached(files, revision, f"commit {folder.name} has no such file, or the cache has not")
    return folder


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the files whose paths in the folder match the pattern, sorted."""
    return sorted(path for path in folder.rglob("*") if fnmatch(path.relative_to(folder).as_posix(), pattern))


def load_rows(paths: Sequence[Path], columns: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """Reads the rows of files of one format, ``.parquet`` or ``.jsonl``.

    Raises:
        DataNotFoundError: The files do not exist or cannot be read.
        InvalidArgumentError: No rows, a missing column, or a file of another format.
        MissingDependencyError: The package ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise _missing("datasets") from error
    first = paths[0]
    _check_file(first)
    if first.suffix not in FORMATS:
        raise InvalidArgumentError(f"expected a file of {', '.join(FORMATS)}, got {first}")
    try:
        rows = load_dataset(FORMATS[first.suffix], data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # the errors of two parsers
        raise DataNotFoundError(f"{first}: cannot be read ({type(error).__name__}: {error})") from error
    if not len(rows) or not set(columns) <= set(rows.column_names):
        raise InvalidArgumentError(
            f"{first}: expected rows with {', '.join(columns)}, got {len(rows)} with {', '.join(rows.column_names)}"
        )
    return rows


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataNotFoundError(f"expected a file at {path}, got {_kind(path)}")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "nothing"


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(f"tasks from the hub need {package}: {install_command('tasks')}")


def _not_reached(files: HubFiles, revision: str, cause: str) -> DataNotFoundError:
    return DataNotFoundError(
        f"{files.pattern} of the data set {files.repo_id} at {revision!r} is neither on this machine nor reachable "
        f"({cause}). With a network: try again. Without: fetch it on a machine that has one (`hf download --repo-type "
        f"dataset {files.repo_id}`) and set HF_HOME to that cache; or give a local .parquet or .jsonl file with the "
        f"columns {', '.join(files.columns)} (source='path')"
    )
