"""Chains of assignments in prose, like RULER's variable tracking (arXiv 2404.06654, section 3)."""

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.leaderboard.metrics import fraction_found
from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.haystack import bury
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter


@dataclass(frozen=True)
class VariableTrackingTask(GeneratedTask):
    """Chains of variables that pass on a number; each question asks for all variables that have one chain's number.

    Attributes:
        n_chains: Chains (and questions) per context.
        n_hops: How often a chain passes its number on (0..25); it has one variable more than that.
        n_letters: Capital letters of a variable's name (2..8).
        n_digits: Digits of the numbers (2..9).
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_chains": 4, "n_hops": 1, "n_letters": 3, "n_digits": 2}}

    n_chains: int = 2
    n_hops: int = 4
    n_letters: int = 5
    n_digits: int = 5
    name: str = "variable_tracking"

    def __post_init__(self) -> None:
        check_between(
            n_chains=(self.n_chains, 1, 26),
            n_hops=(self.n_hops, 0, 25),
            n_letters=(self.n_letters, 2, 8),
            n_digits=(self.n_digits, 2, 9),
        )

    def score(self, prediction: str, question: Question) -> float:
        """Returns the fraction of the variables that is in the answer."""
        return fraction_found(prediction, question.references)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        names = self._names(rng)
        numbers = rng.sample(range(10 ** (self.n_digits - 1), 10**self.n_digits), self.n_chains)
        chains = dict(zip(numbers, zip(*[iter(names)] * (self.n_hops + 1), strict=True), strict=True))
        turns = [number for number in numbers for _ in chains[number]]
        rng.shuffle(turns)  # which chain continues next
        ahead = {number: iter(_assignments(number, chain)) for number, chain in chains.items()}
        units = [next(ahead[number]) for number in turns]
        made = bury(units, filler_sentences(rng), rng, length_tokens, count_tokens, in_order=True)
        first = {number: made.depths[turns.index(number)] for number in numbers}
        questions = (self._question(number, chain, first[number]) for number, chain in chains.items())
        return Sample(f"{index:04d}", seed, made.text, tuple(questions))

    def _names(self, rng: random.Random) -> list[str]:
        names: dict[str, None] = {}
        while len(names) < self.n_chains * (self.n_hops + 1):
            names["".join(rng.choices(string.ascii_uppercase, k=self.n_letters))] = None
        return list(names)

    def _question(self, number: int, chain: tuple[str, ...], depth: float) -> Question:
        return Question(
            question_id=str(number),
            text=f"Which variables have the value {number}, their own or another variable's?",
            references=chain,
            answer_prefix=f"The variables with the value {number} are",
            max_new_tokens=len(chain) * (self.n_letters + 5),
            tags={"depth": depth},
        )


def _assignments(number: int, chain: tuple[str, ...]) -> list[str]:
    return [
        f"VAR {name} = {value}." for name, value in zip(chain, (number, *(f"VAR {n}" for n in chain)), strict=False)
    ]
