"""A prompt that repeats one paragraph; the answer says it once more."""

import random
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from kvzip_press.leaderboard.metrics import words_in_order
from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter

_GIVEN_WORDS = 4  # first words of the paragraph, given as the answer's beginning
_MOST_COPIES = 10_000


@dataclass(frozen=True)
class RepeatedParagraphTask(GeneratedTask):
    """As many copies of a paragraph as the wanted length holds, two at least. There is no context, all is the prompt.

    Attributes:
        n_sentences: Sentences of the paragraph, each of some fifteen words.
        max_new_tokens: The most tokens of the answer; 0 for as many as the paragraph has.
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_sentences": 2}}

    n_sentences: int = 8
    max_new_tokens: int = 0
    name: str = "repeated_paragraph"

    def __post_init__(self) -> None:
        check_between(n_sentences=(self.n_sentences, 1, 1000), max_new_tokens=(self.max_new_tokens, 0, None))

    def score(self, prediction: str, question: Question) -> float:
        """Returns the fraction of the paragraph's words that is said in order."""
        return words_in_order(prediction, question.references)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        paragraph = " ".join(islice(filler_sentences(rng), self.n_sentences))
        size = count_tokens(f"\n\n{paragraph}")
        n_copies = min(max(length_tokens // size, 2), _MOST_COPIES)
        words = paragraph.split(" ")
        question = Question(
            question_id="again",
            text="\n\n".join([paragraph] * n_copies),
            references=(" ".join(words[_GIVEN_WORDS:]),),
            answer_prefix=" ".join(words[:_GIVEN_WORDS]),
            max_new_tokens=self.max_new_tokens or size,
            tags={"copies": float(n_copies)},
        )
        return Sample(f"{index:04d}", seed, "", (question,))
