"""Terms that a text has once: a path, an identifier or a value, and what stands before it in its line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("path", "identifier", "value")
LEAST_BEFORE, MOST_BEFORE = 20, 160  # characters of the line that the question shows
_TERM = re.compile(r"(?<![\w./:@#+-])[\w.~/][\w./:@#+-]{4,39}(?<![.:])(?![\w/@#+-])")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z_.:]*(_|[a-z][A-Z]|\w\.\w|::)\w*")


@dataclass(frozen=True)
class Gap:
    """A term that a text has once, and that is asked for.

    Attributes:
        kind: One of `KINDS`.
        start: Index of its first character in the text.
        before: What stands before it in its line, or the end of that; the text has it once.
        term: The term.
    """

    kind: str
    start: int
    before: str
    term: str


def gaps_in(text: str) -> Iterator[Gap]:
    """Yields the gaps of a text, at most one a line: where several terms of a line would do, the last.

    Term and line each have one place in the text, so a gap has one right answer.
    """
    times = Counter(found[0] for found in _TERM.finditer(text))
    start = 0
    for line in text.splitlines(keepends=True):
        for found in reversed(list(_TERM.finditer(line))):
            gap = _gap(line.rstrip("\n"), start, found) if times[found[0]] == 1 else None
            if gap is not None and text.count(gap.term) == 1 and text.count(gap.before) == 1:
                yield gap
                break
        start += len(line)


def _gap(line: str, start: int, found: re.Match[str]) -> Gap | None:
    kind = _kind(found[0])
    before = line[: found.start()][-MOST_BEFORE:]
    if not kind or len(before.strip()) < LEAST_BEFORE:
        return None
    return Gap(kind, start + found.start(), before, found[0])


def _kind(term: str) -> str:
    """Returns what a term is; empty for a word, which could be guessed."""
    if "/" in term.strip("/"):
        return "path" if re.search(r"[A-Za-z]{2}", term) else ""
    if any(letter.isdigit() for letter in term):
        return "value"
    return "identifier" if _IDENTIFIER.fullmatch(term) else ""
