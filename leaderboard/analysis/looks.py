"""How each press is drawn: the one table from a press's label to its colour, marker and line, for pictures and page."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kvzip_press.files import digest_of

#: On white and on a dark ground. The first three are Okabe and Ito's. Any two, and the grey of the full cache, stay
#: apart for each kind of colour vision, and each has a contrast of at least 3 with its ground (tests compute both).
COLOURS = (
    ("#0072b2", "#3aa5e8"),
    ("#d55e00", "#f0792b"),
    ("#009e73", "#1fc797"),
    ("#000000", "#ffffff"),
    ("#f344eb", "#fed6f9"),
    ("#680635", "#d0126f"),
    ("#300999", "#6350fd"),
    ("#603301", "#a86e3b"),
    ("#319212", "#48e205"),
    ("#6c80bf", "#b2c5fd"),
    ("#95033a", "#ff266d"),
    ("#4607d5", "#7c7cfe"),
    ("#8d5d1c", "#d3a062"),
    ("#774272", "#bb81b6"),
    ("#a45a4e", "#ed9c8e"),
    ("#48316c", "#866fb0"),
)
FULL_COLOUR = ("#6b7280", "#aab2bf")
MARKERS = ("circle", "square", "diamond", "triangle", "turned triangle", "plus", "cross")
FULL_MARKER = "hexagon"
LINES = ((), (6, 2), (1, 2), (6, 2, 1, 2))  # lengths of dashes and gaps, in widths of the line
FULL_LINE = (4, 3)

# Label, without case, spaces and signs -> place in COLOURS. A press that stands here has its colour in every figure.
_KNOWN = {
    "kvzip": 0,
    "fastkvzip": 1,
    "fastkvzipgated": 1,
    "kvziphead": 2,
    "random": 3,
    "snapkv": 4,
    "duoattention": 5,
    "kvziplocal": 6,
    "kvziplocalreplay": 6,
    "adakvexpectedattention": 7,
    "expectedattention": 8,
    "knorm": 9,
    "adakvsnapkv": 10,
    "kvzip+": 11,
    "pyramidkv": 12,
    "streamingllm": 13,
    "tova": 14,
    "keydiff": 15,
}


@dataclass(frozen=True)
class Look:
    """How a press is drawn.

    Attributes:
        colours: On white and on a dark ground, as "#rrggbb".
        marker: One of `MARKERS`, or `FULL_MARKER`.
        line: Lengths of dashes and gaps, in widths of the line; empty for a solid one.
    """

    colours: tuple[str, str]
    marker: str
    line: tuple[int, ...] = ()


def looks(presses: Iterable[str], full: str | None) -> dict[str, Look]:
    """Returns how each press is drawn.

    The full cache is grey, and a known press has the colour of the table. The colour of any other follows from its
    label; where that is taken among these presses, it is the next free one. So the order and the number of presses
    change nothing for known ones, and little for others. With more presses than colours, lines are dashed.

    Args:
        presses: All labels of a run, whether or not a picture shows them, so that all of its pictures agree.
        full: The label of the full cache.
    """
    labels = list(dict.fromkeys(presses))
    places: dict[str, int] = {}
    for label in labels:
        known = _KNOWN.get(_bare(label))
        if label != full and known is not None and known not in places.values():
            places[label] = known
    free = _Free(places.values())
    for label in sorted(set(labels) - places.keys() - {full}):
        places[label] = free.take(int(digest_of(label.encode("utf-8", "surrogatepass"))[:8], 16) % len(COLOURS))
    found = {label: _look(places[label]) for label in labels if label in places}
    return found if full is None else {**found, full: Look(FULL_COLOUR, FULL_MARKER, FULL_LINE)}


class _Free:
    """The places that no press has yet: as many rounds of all colours as are needed."""

    def __init__(self, taken: Iterable[int]) -> None:
        self._rounds = [set(range(len(COLOURS))) - set(taken)]

    def take(self, wanted: int) -> int:
        """Returns a place of the first round that has any: the wanted colour, or the next one that is free."""
        if not self._rounds[-1]:
            self._rounds.append(set(range(len(COLOURS))))
        colour = min(self._rounds[-1], key=lambda place: (place - wanted) % len(COLOURS))
        self._rounds[-1].remove(colour)
        return (len(self._rounds) - 1) * len(COLOURS) + colour


def _look(place: int) -> Look:
    again, colour = divmod(place, len(COLOURS))
    return Look(COLOURS[colour], MARKERS[(colour + again) % len(MARKERS)], LINES[again % len(LINES)])


def _bare(label: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", label.casefold())
