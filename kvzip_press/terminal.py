"""What people read on a terminal or in a log: text of others, and how far long work is.

Text of others is shown as it is, and neither obeyed by the terminal nor read as markup.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

ERROR_CHARACTERS = 4000  # of an error's line; what it quotes may be as long as a file
_JOINERS = "\u200c\u200d"  # in words of Persian and Hindi, and in emoji: these change no order and hide nothing
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidi overrides), surrogates, line and paragraph separators
_SUSPECT = re.compile(r"[^ -~\u00a1-\u00ac\u00ae-\u02ff]")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Returns a text in which each character that a terminal would obey, or cannot show, is written as its escape.

    These are control characters (``\x1b``, ``\x07``), what turns the direction of writing (``\u202e``), what has no
    width, line separators and halves of surrogate pairs.

    Args:
        text: Any text; another object is shown as `str` gives it.
        lines: Whether line breaks and tabs stay, as in an answer of several lines; in a name they are escaped too.
    """
    kept = _JOINERS + ("\n\t" if lines else "")

    def shown(found: re.Match[str]) -> str:
        character = found[0]
        if character in kept or unicodedata.category(character) not in _OBEYED:
            return character
        return character.encode("unicode_escape").decode()

    return _SUSPECT.sub(shown, str(text))


def plain(text: object, style: str = "", *, lines: bool = False) -> Text:
    """Returns a text for rich's tables, bars and consoles, in which square brackets and colons are no markup.

    Args:
        text: As for `printable`.
        style: rich's style of the whole text.
        lines: As for `printable`.
    """
    from rich.text import Text

    return Text(printable(text, lines=lines), style)


def one_line(text: object) -> str:
    """Returns a message as one line of at most `ERROR_CHARACTERS`: printable, with single spaces for line breaks."""
    line = printable(" ".join(part.strip() for part in str(text).splitlines() if part.strip()))
    return line if len(line) <= ERROR_CHARACTERS else f"{line[: ERROR_CHARACTERS - 1]}…"


def counted(n: int, noun: str) -> str:
    """Returns a number with its noun: "1 row", "2 rows"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class Show(Protocol):
    """Says how far a stage of some work is; a stage begins when it is named first."""

    def __call__(self, stage: str, done: int = 0, total: int | None = None, remark: str = "") -> None:
        """Shows ``done`` of ``total`` steps (None if nobody knows how many there are), and a remark."""


@contextmanager
def progress(console: Console, *, transient: bool = True, every: float = 60.0) -> Iterator[Show]:
    """Shows how far long work is while open.

    On a terminal, or in a notebook, that is a bar for each stage. Elsewhere, in a log say, it is a plain line on
    standard error, written as often as ``every`` says, even if a single step takes longer; work that ends before leaves
    no line.

    Args:
        console: Where the bars go.
        transient: Whether the bars disappear when all is done.
        every: Seconds between two lines.

    Yields:
        A function to be called with the stage, the steps done, their number and a remark.
    """
    with ExitStack() as stack:
        watched = console.is_interactive or console.is_jupyter
        yield _bars(console, stack, transient=transient) if watched else _lines(stack, every)


def _bars(console: Console, stack: ExitStack, *, transient: bool) -> Show:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:20}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[steps]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}", markup=False),
    )
    shown = stack.enter_context(Progress(*columns, console=console, transient=transient))
    bars: dict[str, Any] = {}

    def show(stage: str, done: int = 0, total: int | None = None, remark: str = "") -> None:
        if stage not in bars:
            bars[stage] = shown.add_task(printable(stage), total=total, steps="", remark="")
        steps = f"{done}/{total}" if total else f"{done or ''}"
        shown.update(bars[stage], completed=done, total=total, steps=steps, remark=printable(remark))

    return show


def _lines(stack: ExitStack, every: float) -> Show:
    state: dict[str, tuple[float, str]] = {}  # the stage -> when it began, and how far it is; the last one is under way
    ended = threading.Event()

    def show(stage: str, done: int = 0, total: int | None = None, remark: str = "") -> None:
        begun, _ = state.get(stage, (time.monotonic(), ""))
        steps = f": {done} of {total}" if total else f": {done}" if done else ""
        state[stage] = begun, one_line(f"{stage}{steps}{remark and f', {remark}'}")

    def write() -> None:
        while not ended.wait(every):
            if not state:
                continue
            begun, line = list(state.values())[-1]
            minutes, seconds = divmod(round(time.monotonic() - begun), 60)
            sys.stderr.write(f"{line} ({minutes}:{seconds:02} min)\n")
            sys.stderr.flush()

    thread = threading.Thread(target=write, daemon=True, name="kvzip-press progress")
    stack.callback(thread.join)
    stack.callback(ended.set)  # before the join: callbacks run from the last to the first
    thread.start()
    return show
