"""Contexts of an exact length with needles at known depths."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.samples.lengths import Frame, fill, lengthen
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import TokenCounter


@dataclass(frozen=True)
class Haystack:
    """A context and where its needles are.

    Attributes:
        text: The context.
        depths: See `needle_depths`; of each needle, in the order that they were given.
    """

    text: str
    depths: tuple[float, ...]


def bury(
    needles: Sequence[str],
    filler: Iterator[str],
    rng: random.Random,
    length_tokens: int,
    count_tokens: TokenCounter,
    *,
    frame: Frame | None = None,
    in_order: bool = False,
) -> Haystack:
    """Puts needles at random places of filler, and ends with a few idle words, so that the length is exact.

    Args:
        needles: Units that are asked for.
        filler: Units that are not; more than are needed.
        rng: Chooses the places.
        length_tokens: Tokens of the context. Needles that alone are longer are given alone.
        count_tokens: The model's counter.
        frame: What stands around the units; None for sentences.
        in_order: Whether the needles keep their order.

    Returns:
        The context. A vocabulary in which no word of the ending is a single token may leave it a token short.
    """
    frame = frame or Frame()
    units = fill(needles, filler, frame, length_tokens, count_tokens)
    merged, places = spread(needles, units, rng, in_order=in_order)
    text = lengthen(frame.text(merged), length_tokens, count_tokens)
    return Haystack(text, needle_depths(text, frame.starts(merged, places), count_tokens))


def bury_list(
    asked: Sequence[str],
    others: Iterator[str],
    rng: random.Random,
    length_tokens: int,
    count_tokens: TokenCounter,
    *,
    frame: Frame,
    n_units: int = 0,
) -> Haystack:
    """As `bury`, of a list: one as long as the context, or a short one somewhere in prose, which is easier.

    Args:
        asked: Units of the list that are asked for.
        others: Units that are not.
        rng: Chooses the places.
        length_tokens: Tokens of the context.
        count_tokens: The model's counter.
        frame: What stands around the list and its units.
        n_units: Of the list; 0 for as many as fit.
    """
    if not n_units:
        return bury(asked, others, rng, length_tokens, count_tokens, frame=frame)
    units, places = spread(asked, list(itertools.islice(others, n_units - len(asked))), rng)
    listed = frame.text(units)
    text = bury([listed], filler_sentences(rng), rng, length_tokens, count_tokens).text
    begin = text.index(listed)
    starts = [begin + start for start in frame.starts(units, places)]
    return Haystack(text, needle_depths(text, starts, count_tokens))


def needle_depths(text: str, starts: Sequence[int], count_tokens: TokenCounter) -> tuple[float, ...]:
    """For each character index in ``starts``: the tokens before it, as a part of all, in [0, 1)."""
    n_tokens = max(count_tokens(text), 1)
    return tuple(count_tokens(text[:start].rstrip(" ")) / n_tokens for start in starts)


def spread(
    needles: Sequence[str], filler: Sequence[str], rng: random.Random, *, in_order: bool = False
) -> tuple[list[str], list[int]]:
    """Puts needles between filler units, never two in one gap while there are gaps enough.

    Returns:
        All units, and the index of each needle among them.
    """
    gaps = len(filler) + 1
    chosen = rng.sample(range(gaps), len(needles)) if gaps >= len(needles) else rng.choices(range(gaps), k=len(needles))
    chosen = sorted(chosen) if in_order else chosen
    by_gap = sorted(range(len(needles)), key=lambda needle: chosen[needle])  # stable: in order inside a gap
    merged: list[str] = []
    places = [0] * len(needles)
    done = 0
    for needle in by_gap:
        merged += filler[done : chosen[needle]]
        done = chosen[needle]
        places[needle] = len(merged)
        merged.append(needles[needle])
    return merged + list(filler[done:]), places
