"""The work of ``kvzip-press compress``: texts become files of a folder of contexts, each with a name to ask for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from kvzip_press.cli.inputs import text_of
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.compressed import compress
from kvzip_press.press import Press
from kvzip_press.serving.folder import SUFFIX, check_name
from kvzip_press.terminal import plain, progress


@dataclass(frozen=True)
class Text:
    """A text that becomes a context.

    Attributes:
        name: What the context is asked for by.
        text: What is read.
    """

    name: str
    text: str


def texts_of(paths: Sequence[Path], name: str | None) -> list[Text]:
    """Returns the texts of files, named after the files or as the caller says.

    Raises:
        InvalidArgumentError: A file is no text, a name cannot be asked for, or two contexts have one name.
    """
    if name is not None and len(paths) > 1:
        raise InvalidArgumentError(
            f"expected --name with one --text, got {len(paths)} texts: without it each is named after its file"
        )
    names = [path.stem if name is None else name for path in paths]
    for one in names:
        check_name(one)
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise InvalidArgumentError(f"expected files of different names, got several of {', '.join(twice)}")
    return [Text(one, text_of(path)) for one, path in zip(names, paths, strict=True)]


@dataclass
class Compressing:
    """Compresses texts with one model and one press.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        press: The press.
        folder: Where the contexts go; made if it is not there.
        split_special_tokens: Whether control tokens in a text are read as letters.
        console: Where progress and figures go.
    """

    model: Any
    tokenizer: Any
    press: Press
    folder: Path
    split_special_tokens: bool = True
    console: Console = field(default_factory=Console)

    def run(self, texts: Sequence[Text]) -> None:
        """Writes a file for each text, in place of an older one of its name; those that are done stay if one fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for text in texts:
            line = self._written(text)
            self.console.print(plain(line), soft_wrap=True)

    def _written(self, text: Text) -> str:
        path, begin = self.folder / f"{text.name}{SUFFIX}", time.perf_counter()
        with progress(self.console) as show:
            show(f"compressing {text.name}")
            cache = compress(
                self.model,
                self.tokenizer,
                text.text.rstrip(),
                self.press,
                split_special_tokens=self.split_special_tokens,
            )
        cache.save(path, press=self.press)
        return (
            f"{text.name}: {path}, {cache.n_seen} tokens, {cache.kept_fraction:.1%} of pairs kept, "
            f"{cache.resident_bytes / 1e6:.1f} MB, {time.perf_counter() - begin:.1f} s"
        )
