"""What benchmarks of tests load, in a module of its own: their processes import it by name."""

import os
import signal
from pathlib import Path
from typing import Any

from kvzip_press.testing import ByteTokenizer, tiny_model


class Readable(ByteTokenizer):
    """Its texts can be read again."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + one % 26) for one in ids)


def tiny(model: str, device: str | None) -> tuple[Any, Any]:
    """Loads a tiny model."""
    return tiny_model(num_layers=3), Readable()


class Doubles:
    """Makes parts of which each is counted in a file; one that is asked for 13 ends its process."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device

    def double(self, number: int) -> list[int]:
        with (self.folder / "made").open("a") as made:
            made.write(f"{number} ")
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return [number, 2 * number]
