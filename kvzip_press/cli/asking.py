"""The work of ``kvzip-press ask``: caches that answer the same questions side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from transformers import TextStreamer

from kvzip_press.cache.file.writing import read_record
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.answering import answer
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.press import Press
from kvzip_press.registry import get_press
from kvzip_press.terminal import counted, plain, progress


@dataclass
class Asking:
    """Questions, and the model that they are put to.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        questions: The questions, each about the context alone.
        answer_prefix: How every answer begins.
        max_new_tokens: Most tokens of an answer.
        split_special_tokens: Whether control tokens in a text are read as letters.
        console: Where answers and figures go.
    """

    model: Any
    tokenizer: Any
    questions: list[str]
    answer_prefix: str
    max_new_tokens: int
    split_special_tokens: bool
    console: Console = field(default_factory=Console)

    def of_text(self, text: str, press: Press, label: str, save: Path | None) -> None:
        """Asks about a text: its full cache, and one that a press compressed, which ``save`` keeps.

        Args:
            text: The text.
            press: The press.
            label: What is shown above its answers.
            save: Where the compressed cache is kept, if anywhere.
        """
        split = self.split_special_tokens
        with progress(self.console) as show:
            show("reading")
            done = prefill(self.model, self.tokenizer, text.rstrip(), observers=[press], split_special_tokens=split)
            n_tokens = done.valid.shape[1]
            show("reading", 1, 1, counted(n_tokens, "token"))
            show("scoring")
            begin = time.perf_counter()
            compressed = done.evict(press.score(done))
            seconds = time.perf_counter() - begin
            show("scoring", 1, 1)
        if save is not None:  # before anything is asked: reading the context again is what costs
            compressed.save(save, press=press)
        full = done.evict(get_press("none").score(done))
        caches = {"full cache": full, label: compressed}
        self._answers(caches)
        self._figures(caches, f"{n_tokens} tokens read in {done.seconds:.1f} s, compressed in {seconds:.1f} s")

    def of_saved(self, path: Path) -> None:
        """Asks a cache that was compressed and saved earlier."""
        begin = time.perf_counter()
        caches = {path.name: RaggedCache.load(path, self.model)}
        seconds = time.perf_counter() - begin
        record = read_record(path)
        self._answers(caches)
        self._figures(caches, f"{record.n_seen} tokens, {record.press or 'press not named'}; loaded in {seconds:.1f} s")

    def _answers(self, caches: Mapping[str, RaggedCache]) -> None:
        """Prints the answers of each cache, which appear on a terminal as they are written."""
        rows: list[list[str]] = []

        def table() -> Table:
            shown = Table("question", *(Column(plain(name)) for name in caches), show_lines=True)
            for row in rows:
                shown.add_row(*(plain(text.strip(), lines=True) for text in row))
            return shown

        watched = self.console.is_interactive
        showing: AbstractContextManager[Any] = (
            Live(table(), console=self.console, transient=True) if watched else progress(self.console)
        )
        with showing as shown:
            for number, question in enumerate(self.questions):
                row = [question, *("" for _ in caches)]
                rows.append(row)
                for column, cache in enumerate(caches.values(), start=1):
                    if not watched:
                        shown("answering", number, len(self.questions))
                    streamer = _Cell(self.tokenizer, row, column, lambda: shown.update(table())) if watched else None
                    row[column] = self._answer(cache, question, streamer)
        self.console.print(table())

    def _answer(self, cache: RaggedCache, question: str, streamer: TextStreamer | None) -> str:
        return answer(
            self.model,
            self.tokenizer,
            cache,
            question,
            self.answer_prefix,
            self.max_new_tokens,
            streamer=streamer,
            split_special_tokens=self.split_special_tokens,
        )

    def _figures(self, caches: Mapping[str, RaggedCache], note: str) -> None:
        table = Table("cache", "kept pairs", "resident MB", "times smaller")
        for name, cache in caches.items():
            figures = f"{cache.kept_fraction:.1%}", f"{cache.resident_bytes / 1e6:.1f}", f"{cache.compression:.1f}"
            table.add_row(plain(name), *figures)
        self.console.print(table)
        self.console.print(plain(note))


class _Cell(TextStreamer):
    """Writes an answer into a cell of a row, which is drawn anew with each word."""

    def __init__(self, tokenizer: Any, row: list[str], column: int, draw: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.row, self.column, self.draw = row, column, draw

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Adds what was written."""
        self.row[self.column] += text
        self.draw()
