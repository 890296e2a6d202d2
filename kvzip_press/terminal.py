"""Makes text of others fit for a terminal: shown as it is, and neither obeyed by the terminal nor read as markup."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
