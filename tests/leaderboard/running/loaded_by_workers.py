"""What workers of tests load, in a module of its own: other processes import it by name."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_press.testing import ByteTokenizer, tiny_model


@dataclass(frozen=True)
class Loader:
    """Loads a tiny model; each process leaves a file of its number.

    Attributes:
        folder: For these files.
        fails: Whether loading raises an error that cannot be sent to another process.
    """

    folder: Path
    fails: bool = False

    def __call__(self) -> tuple[Any, Any]:
        (self.folder / str(os.getpid())).touch()
        if self.fails:
            raise UnsendableError(1, 2)
        return tiny_model(num_layers=1), ByteTokenizer()


class UnsendableError(Exception):
    """Cannot be made again from its message."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
