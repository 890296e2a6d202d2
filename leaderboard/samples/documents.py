"""Tasks on real documents: a context of whole documents with titles, and questions that need no labels.

A question takes a sentence out of the context. It asks which document the sentence is in, or how it goes on.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.metrics import substring_match, words_in_order
from kvzip_press.leaderboard.options import check_between, check_name
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter

ASKED = ("titles", "sentences", "both")
GIVEN_WORDS, MOST_WORDS = 8, 40
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[^\W\d_]{2,}")
_MARKED = re.compile(r"^\s*([-+*]|#+|\d+\.)\s+", re.MULTILINE)  # the beginning of a heading or of a list's item
_MARKUP = re.compile(r"[#*|`]|^\W")


@dataclass(frozen=True)
class Document:
    """A document: a title that no other has, and a text in paragraphs."""

    title: str
    text: str

    def __str__(self) -> str:
        return f"# {self.title}\n\n{self.text}"

    @property
    def sentences(self) -> list[str]:
        """The sentences of its prose and of its lists, each on one line; code, tables and markup are left out."""
        parts = (part for part in re.split(r"\n\s*\n", self.text) if not part.startswith((" ", "\t")))
        units = (unit for part in parts for unit in (part.splitlines() if _MARKED.search(part) else [part]))
        lines = (" ".join(_MARKED.sub("", unit).split()) for unit in units)
        return [sentence for line in lines for sentence in _SENTENCE.split(line) if _is_prose(sentence)]


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    if _MARKUP.search(sentence) or not sentence.endswith("."):
        return False
    plain = sum(bool(_WORD.fullmatch(word.strip(".,;:()'\"!?"))) for word in words)
    return 2 * GIVEN_WORDS <= len(words) <= MOST_WORDS and plain >= 0.8 * len(words)


@dataclass(frozen=True)
class DocumentTask(GeneratedTask):
    """The base class: whole documents in an order that the seed draws, as many as fit.

    Attributes:
        n_questions: Questions per context, each about another sentence.
        asked: "titles" (which document says a sentence), "sentences" (how one goes on), or "both" in turn.
        multi_turn: Whether the questions follow one another in one conversation.
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_questions": 4}}

    n_questions: int = 8
    asked: str = "both"
    multi_turn: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        check_between(n_questions=(self.n_questions, 1, 100))
        check_name("what is asked", self.asked, ASKED)

    @property
    @abstractmethod
    def documents(self) -> Sequence[Document]:
        """All documents; loaded when they are first needed, with an error if they are not there."""

    @cached_property
    def _sentences(self) -> dict[str, tuple[str, ...]]:
        """Title -> the sentences to ask about: none that names its title, nor begins as one of any document does."""
        found = {one.title: one.sentences for one in self.documents}
        begun = Counter(_begin(sentence) for sentences in found.values() for sentence in sentences)
        return {
            title: tuple(one for one in sentences if begun[_begin(one)] == 1 and not substring_match(one, [title]))
            for title, sentences in found.items()
        }

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the title is in the answer; of a sentence, the fraction of its words in their order."""
        if question.tags["kind"] == "title":
            return substring_match(prediction, question.references)
        return words_in_order(prediction, question.references)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        chosen = self._chosen(rng, length_tokens, count_tokens)
        pool = [(one.title, sentence) for one in chosen for sentence in self._sentences[one.title]]
        if len(pool) < self.n_questions or len(chosen) < 2:
            raise InvalidArgumentError(
                f"expected length_tokens for two documents and {self.n_questions} sentences to ask "
                f"about, got {length_tokens}, with room for {len(chosen)} and {len(pool)}: give more, or ask fewer"
            )
        drawn = rng.sample(pool, self.n_questions)
        kinds = {"titles": ("title",), "sentences": ("sentence",), "both": ("title", "sentence")}[self.asked]
        questions = tuple(_question(number, kinds[number % len(kinds)], *one) for number, one in enumerate(drawn))
        context = "\n\n".join(map(str, chosen))
        return Sample(f"{index:04d}", seed, context, questions, self.multi_turn)

    def _chosen(self, rng: random.Random, length_tokens: int, count_tokens: TokenCounter) -> list[Document]:
        """Returns documents that fit together; one that does not fit into what is left makes room for the next."""
        room, chosen = length_tokens, []
        for one in rng.sample(self.documents, len(self.documents)):
            n = count_tokens(f"{one}\n\n") if len(str(one)) < 16 * room else room + 1  # counting a long one is slow
            if n <= room:
                room -= n
                chosen.append(one)
            if room < length_tokens // 20:
                break
        return chosen


def _begin(sentence: str) -> str:
    return " ".join(sentence.split()[:GIVEN_WORDS])


def _question(number: int, kind: str, title: str, sentence: str) -> Question:
    if kind == "title":
        return Question(
            question_id=f"{number}-title",
            text=f"What is the title of the section with this sentence?\n{sentence}",
            references=(title,),
            answer_prefix="The title is:",
            max_new_tokens=8 + len(title) // 3,
            tags={"kind": kind},
        )
    begin, rest = _begin(sentence), " ".join(sentence.split()[GIVEN_WORDS:])
    return Question(
        question_id=f"{number}-sentence",
        text=f"How does the sentence go on that begins with these words?\n{begin}",
        references=(rest,),
        answer_prefix=f"The sentence is: {begin}",
        max_new_tokens=8 + len(rest) // 3,
        tags={"kind": kind},
    )
