"""Makes texts of an exact length: as many units of filler as fit, then a few idle words."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.samples.task import TokenCounter

_IDLE = ("And", "so", "it", "went", "on", "from", "day", "to", "day", "and", "nobody", "thought", "much", "of", "it.")


@dataclass(frozen=True)
class Frame:
    """The text around and between the units (sentences, lines, paragraphs) of a context.

    Attributes:
        joiner: Text between two units.
        head: Text before the first unit.
        tail: Text after the last unit.
    """

    joiner: str = " "
    head: str = ""
    tail: str = ""

    def text(self, units: Sequence[str]) -> str:
        """Returns the context made of these units."""
        return f"{self.head}{self.joiner.join(units)}{self.tail}"

    def starts(self, units: Sequence[str], places: Sequence[int]) -> list[int]:
        """Returns the character index in that context at which each of the units with these indices begins."""
        return [len(self.head) + sum(len(unit) + len(self.joiner) for unit in units[:place]) for place in places]


def fill(
    needles: Sequence[str], filler: Iterator[str], frame: Frame, length_tokens: int, count_tokens: TokenCounter
) -> list[str]:
    """Returns as many filler units as fit beside the needles.

    The units' token counts do not quite add up to that of the whole text, so the whole is counted again until no more
    units fit.

    Raises:
        InvalidArgumentError: The needles alone are longer than that.
    """
    check_room(count_tokens(frame.text(needles)), length_tokens)
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


def check_room(needed: int, length_tokens: int) -> None:
    """Raises InvalidArgumentError if what is asked for needs more tokens than there are."""
    if needed > length_tokens:
        raise InvalidArgumentError(
            f"expected length_tokens of at least {needed}, which what is asked for takes alone, got {length_tokens}: "
            "give more, or ask for less"
        )


def take(filler: Iterator[str], room: int, count_tokens: TokenCounter, joiner: str = " ") -> list[str]:
    """Takes units until the next one would exceed what is left of ``room`` tokens."""
    units: list[str] = []
    for unit in filler:
        room -= count_tokens(f"{joiner}{unit}")
        if room < 0:
            break
        units.append(unit)
    return units


def lengthen(text: str, length_tokens: int, count_tokens: TokenCounter) -> str:
    """Appends idle words, one at a time, until the text has its length; a longer text is returned unchanged.

    Only the end of the text is counted again for each word: tokenizers split texts at spaces.
    """
    end, ending = text[text.rfind(" ", 0, max(len(text) - 100, 0)) + 1 :], ""
    goal = count_tokens(end) + length_tokens - count_tokens(text)
    for word in itertools.cycle(_IDLE):
        size = count_tokens(end + ending)
        steps = (f"{ending} {word}", f"{ending} I", f"{ending}.")  # from large to small
        step = next((step for step in steps if size < count_tokens(end + step) <= goal), None)
        if size >= goal or step is None:
            break
        ending = step
    return text + ending
