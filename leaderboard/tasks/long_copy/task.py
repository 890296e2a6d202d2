"""A book of titled notes; some are to be copied word for word."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from kvzip_press.leaderboard.metrics import words_in_order
from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.haystack import bury
from kvzip_press.leaderboard.samples.lengths import Frame
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter
from kvzip_press.leaderboard.samples.words import word_pairs

_GIVEN_WORDS = 4  # first words of a note, given as the answer's beginning: without them small models keep starting over


@dataclass(frozen=True)
class LongCopyTask(GeneratedTask):
    """Notes of one form, all with the same number of sentences.

    Attributes:
        n_questions: Number of notes to copy, one per question.
        n_sentences: Sentences per note, each of some fifteen words.
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_sentences": 2}}

    n_questions: int = 2
    n_sentences: int = 10
    name: str = "long_copy"

    def __post_init__(self) -> None:
        check_between(n_questions=(self.n_questions, 1, 1000), n_sentences=(self.n_sentences, 1, 1000))

    def score(self, prediction: str, question: Question) -> float:
        """Returns the fraction of the note's words that is copied in order."""
        return words_in_order(prediction, question.references)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        notes = _notes(rng, self.n_sentences)
        asked = list(islice(notes, self.n_questions))
        units, filler = [_unit(*note) for note in asked], (_unit(*note) for note in notes)
        made = bury(units, filler, rng, length_tokens, count_tokens, frame=Frame(joiner="\n\n"))
        questions = (
            _question(*note, depth, count_tokens(note[1])) for note, depth in zip(asked, made.depths, strict=True)
        )
        return Sample(f"{index:04d}", seed, made.text, tuple(questions))


def _notes(rng: random.Random, n_sentences: int) -> Iterator[tuple[str, str]]:
    sentences = filler_sentences(rng)
    for title in word_pairs(rng, " "):
        yield title, " ".join(islice(sentences, n_sentences))


def _unit(title: str, text: str) -> str:
    return f"Note on the {title}: {text}"


def _question(title: str, text: str, depth: float, n_tokens: int) -> Question:
    words = text.split(" ")
    given, rest = " ".join(words[:_GIVEN_WORDS]), " ".join(words[_GIVEN_WORDS:])
    return Question(
        question_id=title,
        text=f"Copy the note on the {title}, word for word.",
        references=(rest,),
        answer_prefix=f"Note on the {title}: {given}",
        max_new_tokens=max(n_tokens, len(text) // 4),
        tags={"depth": depth},
    )
