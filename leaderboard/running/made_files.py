"""Files that presses of a grid need and that a command makes beforehand, such as gates trained for a model."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class MadeFile:
    """A file or a folder, and the command that makes it.

    Attributes:
        path: Where it is, from the directory that the run is started in.
        command: What makes it there.
        sha256: Of its contents; of a folder, of its files' names and contents. Empty while it is not there, or a folder
            without files. A run's configuration has it: rows of two files are not rows of one run.
    """

    path: str
    command: str
    sha256: str = ""

    def looked_at(self) -> Self:
        """Returns this with the digest of what is there now."""
        return replace(self, sha256=_digest(Path(self.path)))

    def check(self) -> None:
        """Raises unless the file is there, as it was when it was looked at.

        Raises:
            InvalidArgumentError: It is not; the message has the command.
        """
        found = _digest(Path(self.path))
        if not found:
            if Path(self.path).is_dir():
                raise InvalidArgumentError(
                    f"expected files in {self.path}, which `{self.command}` makes beforehand, got a folder without any"
                )
            raise InvalidArgumentError(f"expected {self.path} to be there, made beforehand by `{self.command}`")
        if found != self.sha256:
            raise InvalidArgumentError(
                f"expected {self.path} as it was when the run began, got one that was changed or made since: begin anew"
            )


def _digest(path: Path) -> str:
    """Returns the SHA-256 of a file, or of a folder's files; empty if there is none."""
    if path.is_file():
        return _of_file(path)
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else []
    return (
        hashlib.sha256("".join(f"{one.name}\0{_of_file(one)}\n" for one in files).encode()).hexdigest() if files else ""
    )


def _of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidArgumentError(f"expected to read {path}, got {error}") from error
