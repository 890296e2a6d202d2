"""A page about invented people; each question asks for one attribute of one of them."""

import random
from dataclasses import dataclass

from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.lengths import check_room
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import GeneratedTask, Question, Sample, TokenCounter
from kvzip_press.leaderboard.tasks.profile_qa.people import ATTRIBUTES, MAX_PEOPLE, NAMES, Attribute


@dataclass(frozen=True)
class ProfileQATask(GeneratedTask):
    """A page about ``n_people`` invented people with ``n_attributes`` facts each; every fact is asked for.

    Attributes:
        n_people: People per page (1..10), each with a paragraph; no two share a value.
        n_attributes: Facts per person (1..10).
        max_new_tokens: The most tokens of an answer, which is one word or name.
        multi_turn: Whether the questions form one conversation: only the first about a person names them, the others
            ask about "this person", so that the earlier turns are needed too.
    """

    n_people: int = 2
    n_attributes: int = 4
    max_new_tokens: int = 3
    multi_turn: bool = False
    name: str = "profile_qa"

    def __post_init__(self) -> None:
        check_between(n_people=(self.n_people, 1, MAX_PEOPLE), n_attributes=(self.n_attributes, 1, len(ATTRIBUTES)))

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        people = rng.sample(NAMES, self.n_people)
        values = {attribute.key: rng.sample(attribute.values, self.n_people) for attribute in ATTRIBUTES}
        paragraphs, questions = [], []
        for person, name in enumerate(people):
            chosen = rng.sample(ATTRIBUTES, self.n_attributes)
            facts = [attribute.sentence.format(name=name, value=values[attribute.key][person]) for attribute in chosen]
            paragraphs.append(facts)
            questions += [
                self._question(name, attribute, values[attribute.key][person], named=not (self.multi_turn and turn))
                for turn, attribute in enumerate(chosen)
            ]
        _pad(paragraphs, rng, length_tokens, count_tokens)
        context = "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)
        return Sample(f"{index:04d}", seed, context, tuple(questions), self.multi_turn)

    def _question(self, name: str, attribute: Attribute, value: str, *, named: bool) -> Question:
        called = name if named else "this person"
        prefix = attribute.answer_prefix.format(name=called)
        return Question(
            question_id=f"{name}/{attribute.key}",
            text=attribute.question.format(name=called),
            references=(value,),
            answer_prefix=prefix[0].upper() + prefix[1:],
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True)
class ProfileTurnsTask(ProfileQATask):
    """`ProfileQATask` as one conversation."""

    multi_turn: bool = True
    name: str = "profile_qa_turns"


def _pad(paragraphs: list[list[str]], rng: random.Random, length_tokens: int, count_tokens: TokenCounter) -> None:
    """Puts filler sentences between the facts, paragraph by paragraph, until the page has its length."""
    needed = sum(count_tokens(f" {sentence}") for paragraph in paragraphs for sentence in paragraph)
    check_room(needed, length_tokens)
    room = length_tokens - needed
    for turn, sentence in enumerate(filler_sentences(rng)):
        room -= count_tokens(f" {sentence}")
        if room < 0:
            return
        paragraph = paragraphs[turn % len(paragraphs)]
        paragraph.insert(rng.randint(1, len(paragraph)), sentence)
