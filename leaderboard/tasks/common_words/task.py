"""A long list of words, some of which come often, like RULER's common words (arXiv 2404.06654, section 3)."""

import random
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from kvzip_press.leaderboard.metrics import fraction_found
from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.lengths import Frame, fill, lengthen
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter
from kvzip_press.leaderboard.samples.words import word_pairs


@dataclass(frozen=True)
class CommonWordsTask(GeneratedTask):
    """A shuffled list of words; the question asks for those that come most often.

    Attributes:
        n_common: Number of common words, all of which are asked for.
        common_times: How often each common word comes.
        other_times: How often each other word comes; there are as many other words as fit.
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_common": 2, "common_times": 12, "other_times": 1}}

    n_common: int = 10
    common_times: int = 30
    other_times: int = 3
    name: str = "common_words"

    def __post_init__(self) -> None:
        check_between(
            n_common=(self.n_common, 1, 100),
            other_times=(self.other_times, 1, None),
            common_times=(self.common_times, self.other_times + 1, None),
        )

    def score(self, prediction: str, question: Question) -> float:
        """Returns the fraction of the common words that is in the answer."""
        return fraction_found(prediction, question.references)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        words = word_pairs(rng)
        common = tuple(islice(words, self.n_common))
        listed = [word for word in common for _ in range(self.common_times)]
        frame = Frame(joiner=", ", head="The words: ", tail=".")
        repeated = (frame.joiner.join([word] * self.other_times) for word in words)
        for unit in fill(listed, repeated, frame, length_tokens, count_tokens):
            listed += unit.split(frame.joiner)
        rng.shuffle(listed)
        context = lengthen(frame.text(listed), length_tokens, count_tokens)
        return Sample(f"{index:04d}", seed, context, (self._question(common),))

    def _question(self, common: tuple[str, ...]) -> Question:
        those = "word comes" if len(common) == 1 else f"{len(common)} words come"
        return Question(
            question_id="most",
            text=f"Which {those} most often in the list?",
            references=common,
            answer_prefix=f"The {those} most often in the list:",
            max_new_tokens=sum(6 + len(word) // 2 for word in common),
        )
