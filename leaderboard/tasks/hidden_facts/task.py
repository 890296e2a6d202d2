"""Facts of one form, hidden in prose; each is asked for in a question."""

import random
from dataclasses import dataclass

from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.haystack import needle_depths, spread
from kvzip_press.leaderboard.samples.lengths import check_room, take
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import GeneratedTask, Question, Sample, TokenCounter

_NAMES = (
    "Alda", "Boris", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Marta",
    "Nils", "Olga", "Pablo", "Rosa", "Stefan", "Tessa", "Ulrich", "Vera", "Walter", "Yara", "Zoe",
)  # fmt: skip


@dataclass(frozen=True)
class HiddenFactsTask(GeneratedTask):
    """``n_keys`` sentences of the form "The phone number of Vera is 47." at random places in prose, all asked for.

    Attributes:
        n_keys: Facts (and questions) per context (1..24). Each fact is a distractor for the others.
        n_digits: Digits of a number (2..9); more are harder to keep and to copy.
        max_new_tokens: The most tokens of an answer; in many vocabularies two digits with their space are three tokens.
    """

    n_keys: int = 4
    n_digits: int = 2
    max_new_tokens: int = 3
    name: str = "hidden_facts"

    def __post_init__(self) -> None:
        check_between(n_keys=(self.n_keys, 1, len(_NAMES)), n_digits=(self.n_digits, 2, 9))

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        numbers = range(10 ** (self.n_digits - 1), 10**self.n_digits)
        facts = dict(zip(rng.sample(_NAMES, self.n_keys), rng.sample(numbers, self.n_keys), strict=True))
        sentences = [f"The phone number of {name} is {number}." for name, number in facts.items()]
        needed = sum(count_tokens(f" {sentence}") for sentence in sentences)
        check_room(needed, length_tokens)
        room = length_tokens - needed
        units, places = spread(sentences, take(filler_sentences(rng), room, count_tokens), rng)
        context = " ".join(units)
        depths = needle_depths(context, [len(" ".join(units[:place])) for place in places], count_tokens)
        questions = (self._question(*fact, depth) for fact, depth in zip(facts.items(), depths, strict=True))
        return Sample(f"{index:04d}", seed, context, tuple(questions))

    def _question(self, name: str, number: int, depth: float) -> Question:
        return Question(
            question_id=name,
            text=f"What is the phone number of {name}?",
            references=(str(number),),
            answer_prefix=f"The phone number of {name} is",
            max_new_tokens=self.max_new_tokens,
            tags={"depth": depth},
        )
