"""Needles in a haystack, in RULER's variants (arXiv 2404.06654, section 3): sentences that give a number to a key."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from kvzip_press.leaderboard.metrics import fraction_found
from kvzip_press.leaderboard.options import check_between, check_name
from kvzip_press.leaderboard.samples.haystack import bury
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter
from kvzip_press.leaderboard.samples.words import word_pairs

KINDS = (
    "phone number", "locker code", "bus line", "house number", "room number", "ticket number", "member number",
    "flight number",
)  # fmt: skip
HAYSTACKS = ("prose", "needles")
_SMALL = {"n_digits": 2, "extra_tokens": 0}


@dataclass(frozen=True)
class _Needle:
    """A key with its values; each value has a sentence of its own."""

    kind: str
    key: str
    values: tuple[str, ...]

    def sentences(self) -> list[str]:
        begin = (
            f"The {self.kind} of {self.key} is" if len(self.values) == 1 else f"The {self.kind}s of {self.key} include"
        )
        return [f"{begin} {value}." for value in self.values]


@dataclass(frozen=True)
class NeedleTask(GeneratedTask):
    """The base class of the four tasks, which differ only in these numbers.

    Attributes:
        n_questions: Questions per context.
        n_keys: Keys in the context, asked for or not (at least ``n_questions * n_queried``).
        n_kinds: Kinds of numbers, which the questions take in turn: if each has its own, no needle looks like another.
        n_values: Values per key, each in a sentence of its own; all are asked for.
        n_queried: Keys per question.
        n_digits: Digits of a value (2..9).
        haystack: "prose", or "needles": then the filler consists of needles too, of the same kinds.
        extra_tokens: Tokens of an answer beyond the values: larger models like to set them in bold or in a sentence.
    """

    n_questions: int = 4
    n_keys: int = 4
    n_kinds: int = 1
    n_values: int = 1
    n_queried: int = 1
    n_digits: int = 7
    haystack: str = "prose"
    extra_tokens: int = 16
    name: str = "niah"

    def __post_init__(self) -> None:
        check_name("a haystack", self.haystack, HAYSTACKS)
        check_between(
            n_questions=(self.n_questions, 1, None),
            n_queried=(self.n_queried, 1, None),
            n_values=(self.n_values, 1, None),
            n_kinds=(self.n_kinds, 1, len(KINDS)),
            n_digits=(self.n_digits, 2, 9),
        )
        most = 9 * 10 ** (self.n_digits - 1) // self.n_values  # so that no two keys share a value
        check_between(n_keys=(self.n_keys, self.n_questions * self.n_queried, most))

    def score(self, prediction: str, question: Question) -> float:
        """Returns the fraction of the values that is in the answer."""
        return fraction_found(prediction, question.references)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        kinds, keys = rng.sample(KINDS, self.n_kinds), word_pairs(rng, " ")
        needles = self._needles(rng, kinds, keys)
        sentences = [sentence for needle in needles for sentence in needle.sentences()]
        filler = filler_sentences(rng) if self.haystack == "prose" else self._distractors(rng, kinds, keys)
        made = bury(sentences, filler, rng, length_tokens, count_tokens)
        n_asked = self.n_queried * self.n_values  # sentences per question
        questions = (
            self._question(
                needles[i * self.n_queried : (i + 1) * self.n_queried],
                sum(made.depths[i * n_asked : (i + 1) * n_asked]) / n_asked,
            )
            for i in range(self.n_questions)
        )
        return Sample(f"{index:04d}", seed, made.text, tuple(questions))

    def _needles(self, rng: random.Random, kinds: Sequence[str], keys: Iterator[str]) -> list[_Needle]:
        values = [str(number) for number in rng.sample(self._numbers, self.n_keys * self.n_values)]
        return [
            _Needle(kinds[i // self.n_queried % self.n_kinds], key, tuple(values[i :: self.n_keys]))
            for i, key in enumerate(islice(keys, self.n_keys))
        ]

    def _distractors(self, rng: random.Random, kinds: Sequence[str], keys: Iterator[str]) -> Iterator[str]:
        for key in keys:
            yield from _Needle(rng.choice(kinds), key, (str(rng.choice(self._numbers)),)).sentences()

    def _question(self, needles: Sequence[_Needle], depth: float) -> Question:
        references = tuple(value for needle in needles for value in needle.values)
        kind, keys = needles[0].kind, _listed([needle.key for needle in needles])
        is_one, verb = len(references) == 1, "include" if self.n_values > 1 else "are"
        return Question(
            question_id=keys,
            text=f"What is the {kind} of {keys}?" if is_one else f"What are all {kind}s of {keys}?",
            references=references,
            answer_prefix=f"The {kind} of {keys} is" if is_one else f"The {kind}s of {keys} {verb}",
            max_new_tokens=sum(len(f" {value}") for value in references) + 2 * len(references) - 2 + self.extra_tokens,
            tags={"depth": depth},
        )

    @property
    def _numbers(self) -> range:
        return range(10 ** (self.n_digits - 1), 10**self.n_digits)


@dataclass(frozen=True)
class SingleTask(NeedleTask):
    """One needle per question, of a form that no other needle has."""

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {**_SMALL}}

    n_kinds: int = 4
    name: str = "niah_single"


@dataclass(frozen=True)
class MultikeyTask(NeedleTask):
    """Needles of one form; those that are not asked for are distractors."""

    presets: ClassVar[Presets] = {
        "default": {},
        "smollm2": {**_SMALL, "n_keys": 4},
        "needles": {"haystack": "needles"},
    }

    n_keys: int = 8
    name: str = "niah_multikey"


@dataclass(frozen=True)
class MultivalueTask(NeedleTask):
    """Several values per key, all of them wanted."""

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {**_SMALL, "n_values": 2}}

    n_questions: int = 2
    n_values: int = 4
    name: str = "niah_multivalue"


@dataclass(frozen=True)
class MultiqueryTask(NeedleTask):
    """Several keys per question; the value of each is wanted."""

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {**_SMALL, "n_keys": 4, "n_queried": 2}}

    n_questions: int = 2
    n_keys: int = 8
    n_queried: int = 4
    name: str = "niah_multiquery"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
