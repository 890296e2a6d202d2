"""Texts that packages of the user's own environment ship: read where they lie, never bundled, pinned by their hash."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvzip_press.errors import DataNotFoundError, MissingDependencyError
from kvzip_press.untrusted import read_bytes

MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class InstalledFile:
    """A file of an installed package.

    Attributes:
        distribution: The package's name where it is installed from.
        version: Its version: another may hold other texts.
        path: Where the file lies, relative to the folder that packages are installed in.
        sha256: The file's hash, in hexadecimal.
        install: The command that installs the package.
    """

    distribution: str
    version: str
    path: str
    sha256: str
    install: str

    @property
    def revision(self) -> str:
        """What rows say that their data are."""
        return f"{self.distribution} {self.version}, sha256 {self.sha256[:16]}"

    def read(self) -> bytes:
        """Returns the file's content.

        Raises:
            MissingDependencyError: The package is not installed, or in another version.
            DataNotFoundError: The file is not there, or not the one that was published.
        """
        try:
            installed = metadata.distribution(self.distribution)
        except metadata.PackageNotFoundError:
            raise MissingDependencyError(self._expected("none")) from None
        if installed.version != self.version:
            raise MissingDependencyError(self._expected(f"{installed.version:.40}"))
        path = Path(str(installed.locate_file(self.path)))
        try:
            content = read_bytes(path, max_bytes=MAX_BYTES)
        except OSError as error:
            raise DataNotFoundError(
                f"expected {self.path} of {self.distribution} {self.version}, got {error}"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise DataNotFoundError(
                f"expected {path} as {self.distribution} {self.version} was published (sha256 {self.sha256[:16]}), got "
                f"sha256 {found[:16]}: install the package anew"
            )
        return content

    def _expected(self, got: str) -> str:
        return (
            f"expected the package {self.distribution} {self.version}, whose texts this task reads, got {got}: "
            f"{self.install}"
        )


def standard_library(module: str) -> str:
    """Returns the source of a module of Python's own library, given by its path there (``urllib/parse.py``).

    One that a later Python has made a package of (zipfile in 3.12) is its ``__init__.py``.

    Raises:
        DataNotFoundError: This Python does not have its sources.
    """
    path = Path(sysconfig.get_path("stdlib")) / module
    if not path.exists() and (package := path.with_suffix("") / "__init__.py").exists():
        path = package
    try:
        return read_bytes(path, max_bytes=MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataNotFoundError(
            f"expected the source of Python's own {module} at {path}, got {error}: use a Python that has its library"
        ) from error


def python_revision(*texts: str) -> str:
    """Returns what rows say of texts of this Python: its version, and their hash, which changes between versions."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return f"python {platform.python_version()}, sha256 {digest[:16]}"
