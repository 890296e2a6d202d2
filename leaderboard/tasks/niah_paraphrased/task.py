"""Needles in a haystack, asked for in other words: nothing in the question can be found by matching words."""

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.leaderboard.options import check_between, check_name
from kvzip_press.leaderboard.samples.haystack import bury
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter
from kvzip_press.leaderboard.tasks.niah_paraphrased.facts import FACTS
from kvzip_press.leaderboard.tasks.profile_qa.people import NAMES

WORDINGS = ("other", "same")
MOST = min(len(FACTS), len(NAMES))


@dataclass(frozen=True)
class ParaphrasedTask(GeneratedTask):
    """Facts about people in prose; a question asks who it is, in other words or, as its control, in the same.

    Attributes:
        n_questions: Questions per context.
        n_facts: Facts per context, each about another person (at least ``n_questions``); all are distractors.
        wording: "other" shares no content word with the context; "same" repeats the fact's own words. The contexts are
            the same.
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_questions": 4, "n_facts": 4}}

    n_questions: int = 8
    n_facts: int = 16
    wording: str = "other"
    name: str = "niah_paraphrased"

    def __post_init__(self) -> None:
        check_name("a wording", self.wording, WORDINGS)
        check_between(n_questions=(self.n_questions, 1, MOST))
        check_between(n_facts=(self.n_facts, self.n_questions, MOST))

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the answer begins with the name."""
        found = re.match(r"\W*(\w+)", prediction)
        return float(found is not None and found[1].lower() == question.references[0].lower())

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"niah_paraphrased/{seed}/{index}")  # whatever its name: the control has the same contexts
        facts = dict(zip(rng.sample(sorted(FACTS), self.n_facts), rng.sample(NAMES, self.n_facts), strict=True))
        needles = [f"{name} {fact}." for fact, name in facts.items()]
        made = bury(needles, filler_sentences(rng), rng, length_tokens, count_tokens)
        asked = list(zip(facts.items(), made.depths, strict=True))[: self.n_questions]
        questions = (self._question(fact, name, depth) for (fact, name), depth in asked)
        return Sample(f"{index:04d}", seed, made.text, tuple(questions))

    def _question(self, fact: str, name: str, depth: float) -> Question:
        return Question(
            question_id=fact,
            text=FACTS[fact] if self.wording == "other" else f"Who {fact}?",
            references=(name,),
            answer_prefix="Name:",
            max_new_tokens=6,
            tags={"depth": depth},
        )
