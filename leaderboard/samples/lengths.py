"""Texts of an exact length: as many units of filler as fit, then a few idle words."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.samples.task import TokenCounter

_IDLE = ("And", "so", "it", "went", "on", "from", "day", "to", "day", "and", "nobody", "thought", "much", "of", "it.")


@dataclass(frozen=True)
class Frame:
    """What stands around and between the units (sentences, lines, paragraphs) of a context.

    Attributes:
        joiner: Between two units.
        head: Before the first.
        tail: After the last.
    """

    joiner: str = " "
    head: str = ""
    tail: str = ""

    def text(self, units: Sequence[str]) -> str:
        """The context of these units."""
        return f"{self.head}{self.joiner.join(units)}{self.tail}"

    def starts(self, units: Sequence[str], places: Sequence[int]) -> list[int]:
        """The character of that context at which each of some units, by their index, begins."""
        return [len(self.head) + sum(len(unit) + len(self.joiner) for unit in units[:place]) for place in places]


def fill(
    needles: Sequence[str], filler: Iterator[str], frame: Frame, length_tokens: int, count_tokens: TokenCounter
) -> list[str]:
    """As many filler units as fit beside the needles.

    The counts of the units do not quite add up to the count of the whole, so that is counted too, until nothing fits.
    """
    units: list[str] = []
    while True:
        room = length_tokens - count_tokens(frame.text([*needles, *units]))
        more = take(filler, room, count_tokens, frame.joiner)
        units += more
        if not more:
            break
    while units and count_tokens(frame.text([*needles, *units])) > length_tokens:
        units.pop()
    return units


def take(filler: Iterator[str], room: int, count_tokens: TokenCounter, joiner: str = " ") -> list[str]:
    """Units up to the first that exceeds what is left of ``room`` tokens."""
    units: list[str] = []
    for unit in filler:
        room -= count_tokens(f"{joiner}{unit}")
        if room < 0:
            break
        units.append(unit)
    return units


def lengthen(text: str, length_tokens: int, count_tokens: TokenCounter) -> str:
    """Ends a text with idle words, a word at a time, until it has its length; a longer text stays as it is.

    Only the end of the text is counted again for each word: vocabularies part texts at spaces.
    """
    end, ending = text[text.rfind(" ", 0, max(len(text) - 100, 0)) + 1 :], ""
    goal = count_tokens(end) + length_tokens - count_tokens(text)
    for word in itertools.cycle(_IDLE):
        size = count_tokens(end + ending)
        steps = (f"{ending} {word}", f"{ending} I", f"{ending}.")  # smaller and smaller
        step = next((step for step in steps if size < count_tokens(end + step) <= goal), None)
        if size >= goal or step is None:
            break
        ending = step
    return text + ending
