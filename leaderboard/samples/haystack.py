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
        depths: The depth of each needle (see `needle_depths`), in the order in which the needles were given.
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
    """Puts needles at random places in filler, and ends with a few idle words so that the length is exact.

    Args:
        needles: Units that are asked for.
        filler: Units that are not asked for; must be more than fit.
        rng: Chooses the places.
        length_tokens: Tokens of the context.
        count_tokens: The model's counter.
        frame: The text around and between the units; None for sentences.
        in_order: Whether the needles keep their order.

    Returns:
        The context. It may be one token short if no idle word is a single token in the model's vocabulary.

    Raises:
        InvalidArgumentError: The needles alone are longer than ``length_tokens``.
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
    """Does for a list what `bury` does: a list as long as the context, or a short one in prose, which is easier.

    Args:
        asked: Units of the list that are asked for.
        others: Units that are not asked for.
        rng: Chooses the places.
        length_tokens: Tokens of the context.
        count_tokens: The model's counter.
        frame: The text around the list and between its units.
        n_units: Number of units in the list; 0 for as many as fit.
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
    """Returns, for each character index in ``starts``, the fraction of the text's tokens before it, in [0, 1)."""
    n_tokens = max(count_tokens(text), 1)
    return tuple(count_tokens(text[:start].rstrip(" ")) / n_tokens for start in starts)


def spread(
    needles: Sequence[str], filler: Sequence[str], rng: random.Random, *, in_order: bool = False
) -> tuple[list[str], list[int]]:
    """Puts needles between filler units, at most one in each gap if there are enough gaps.

    Returns:
        All units, and the index of each needle among them.
    """
    gaps = len(filler) + 1
    chosen = rng.sample(range(gaps), len(needles)) if gaps >= len(needles) else rng.choices(range(gaps), k=len(needles))
    chosen = sorted(chosen) if in_order else chosen
    by_gap = sorted(range(len(needles)), key=lambda needle: chosen[needle])  # stable: keeps the order within a gap
    merged: list[str] = []
    places = [0] * len(needles)
    done = 0
    for needle in by_gap:
        merged += filler[done : chosen[needle]]
        done = chosen[needle]
        places[needle] = len(merged)
        merged.append(needles[needle])
    return merged + list(filler[done:]), places
