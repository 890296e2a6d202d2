"""Facts of one form, hidden in prose; each is asked for."""

import random
from dataclasses import dataclass

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.prose import filler_sentences
from kvzip_press.leaderboard.task import GeneratedTask, Question, Sample, TokenCounter

_NAMES = (
    "Alda", "Boris", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Marta",
    "Nils", "Olga", "Pablo", "Rosa", "Stefan", "Tessa", "Ulrich", "Vera", "Walter", "Yara", "Zoe",
)  # fmt: skip


@dataclass(frozen=True)
class HiddenFactsTask(GeneratedTask):
    """``n_keys`` sentences of the form "The phone number of Vera is 47." at random places in prose, all asked for.

    Attributes:
        n_keys: Facts, and questions, a context (1..24). Each fact is a distractor of the others.
        n_digits: Digits of a number (2..9); more are harder to keep and to copy.
        max_new_tokens: Bound of an answer; two digits are three tokens in many vocabularies, with the space.
    """

    n_keys: int = 4
    n_digits: int = 2
    max_new_tokens: int = 3
    name: str = "hidden_facts"

    def __post_init__(self) -> None:
        if not 1 <= self.n_keys <= len(_NAMES):
            raise InvalidArgumentError(f"expected n_keys in 1..{len(_NAMES)}, got {self.n_keys}")
        if not 2 <= self.n_digits <= 9:
            raise InvalidArgumentError(f"expected n_digits in 2..9, got {self.n_digits}")

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        numbers = range(10 ** (self.n_digits - 1), 10**self.n_digits)
        facts = dict(zip(rng.sample(_NAMES, self.n_keys), rng.sample(numbers, self.n_keys), strict=True))
        sentences = [f"The phone number of {name} is {number}." for name, number in facts.items()]
        room = length_tokens - sum(count_tokens(f" {sentence}") for sentence in sentences)
        context = " ".join(_spread(sentences, _filler(rng, room, count_tokens), rng))
        questions = (self._question(name, number) for name, number in facts.items())
        return Sample(f"{index:04d}", seed, context, tuple(questions))

    def _question(self, name: str, number: int) -> Question:
        return Question(
            question_id=name,
            text=f"What is the phone number of {name}?",
            references=(str(number),),
            answer_prefix=f"The phone number of {name} is",
            max_new_tokens=self.max_new_tokens,
        )


def _filler(rng: random.Random, room: int, count_tokens: TokenCounter) -> list[str]:
    sentences: list[str] = []
    for sentence in filler_sentences(rng):
        room -= count_tokens(f" {sentence}")
        if room < 0:
            return sentences
        sentences.append(sentence)
    raise AssertionError("filler never ends")


def _spread(facts: list[str], filler: list[str], rng: random.Random) -> list[str]:
    """Put the facts between the filler sentences, never two in one gap while there are gaps enough."""
    gaps = len(filler) + 1
    places = rng.sample(range(gaps), len(facts)) if gaps >= len(facts) else rng.choices(range(gaps), k=len(facts))
    at: dict[int, list[str]] = {place: [] for place in places}
    for place, fact in zip(places, facts, strict=True):
        at[place].append(fact)
    merged = []
    for gap in range(gaps):
        merged += at.get(gap, [])
        merged += filler[gap : gap + 1]
    return merged
