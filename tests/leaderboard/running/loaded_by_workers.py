"""What workers of tests load, in a module of its own: other processes import it by name."""

import os
import signal
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
        dies: Whether the first process that is at its third forward is killed there, in the middle of its work.
    """

    folder: Path
    fails: bool = False
    dies: bool = False

    def __call__(self) -> tuple[Any, Any]:
        (self.folder / str(os.getpid())).touch()
        if self.fails:
            raise UnsendableError(1, 2)
        model = tiny_model(num_layers=1)
        if self.dies:
            done: list[None] = []

            def at_forward(*_: Any) -> None:
                done.append(None)
                if len(done) == 3 and self._is_first():
                    os.kill(os.getpid(), signal.SIGKILL)

            model.model.register_forward_pre_hook(at_forward)
        return model, ByteTokenizer()

    def _is_first(self) -> bool:
        try:
            (self.folder.parent / "died").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Environment:
    """What a process knows of its environment."""

    def value(self, name: str) -> str | None:
        return os.environ.get(name)


class UnsendableError(Exception):
    """Cannot be made again from its message."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
