"""A long list of entries, found by their beginning and end, like Retr.Prefix-Suffix of SCBench (arXiv 2412.10319)."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from kvzip_press.leaderboard.options import check_between, check_name
from kvzip_press.leaderboard.samples.haystack import bury_list
from kvzip_press.leaderboard.samples.lengths import Frame
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter
from kvzip_press.leaderboard.samples.words import NOUNS, word_pairs

_FRAME = Frame(joiner="\n", head="The entries:\n", tail="\n\nThat is all.")


@dataclass(frozen=True)
class PrefixSuffixTask(GeneratedTask):
    """Entries made of parts joined by hyphens; the answer is everything behind the first part.

    Attributes:
        n_questions: Questions per context.
        n_entries: Entries of the list, which then sits somewhere in prose; 0 for a list that fills the context.
        n_parts: Parts of an entry (3..20): the first and the last are in the question.
        n_siblings: For each entry asked for, this many others share its beginning, and this many its end.
        parts: "hex" (six digits) or "words".
    """

    presets: ClassVar[Presets] = {
        "default": {},
        "smollm2": {"n_entries": 6, "n_parts": 3, "n_siblings": 0, "parts": "words"},
    }

    n_questions: int = 4
    n_entries: int = 0
    n_parts: int = 6
    n_siblings: int = 1
    parts: str = "hex"
    name: str = "prefix_suffix"

    def __post_init__(self) -> None:
        check_name("parts", self.parts, _PARTS)
        check_between(
            n_questions=(self.n_questions, 1, 1000),
            n_parts=(self.n_parts, 3, 20),
            n_siblings=(self.n_siblings, 0, 100),
            n_entries=(self.n_entries, 0, None),
        )
        if self.n_entries:
            check_between(n_entries=(self.n_entries, self.n_questions * (1 + 2 * self.n_siblings), None))

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        entries = _PARTS[self.parts](rng, self.n_parts)
        asked = list(islice(entries, self.n_questions))
        like = [
            alike
            for entry in asked
            for first, last in islice(zip(entries, entries, strict=False), self.n_siblings)
            for alike in ([entry[0], *first[1:]], [*last[:-1], entry[-1]])
        ]
        units = ["-".join(entry) for entry in asked + like]
        filler = ("-".join(entry) for entry in entries)
        made = bury_list(units, filler, rng, length_tokens, count_tokens, frame=_FRAME, n_units=self.n_entries)
        questions = (_question(entry, depth) for entry, depth in zip(asked, made.depths, strict=False))
        return Sample(f"{index:04d}", seed, made.text, tuple(questions))


def _question(entry: list[str], depth: float) -> Question:
    rest = "-".join(entry[1:])
    return Question(
        question_id="-".join(entry),
        text=f'Which entry begins with "{entry[0]}" and ends with "{entry[-1]}"?',
        references=(rest,),
        answer_prefix=f"The entry:\n{entry[0]}-",
        max_new_tokens=len(rest),
        tags={"depth": depth},
    )


def _hex_entries(rng: random.Random, n_parts: int) -> Iterator[list[str]]:
    while True:
        yield [f"{rng.getrandbits(24):06x}" for _ in range(n_parts)]


def _word_entries(rng: random.Random, n_parts: int) -> Iterator[list[str]]:
    for first in word_pairs(rng, ""):
        yield [first, *rng.sample(NOUNS, n_parts - 1)]


_PARTS: dict[str, Callable[[random.Random, int], Iterator[list[str]]]] = {"hex": _hex_entries, "words": _word_entries}
