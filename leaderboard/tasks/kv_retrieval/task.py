"""A long JSON object of meaningless keys and values, like Retr.KV of SCBench (arXiv 2412.10319)."""

import random
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from kvzip_press.leaderboard.options import check_between, check_name
from kvzip_press.leaderboard.samples.haystack import bury_list
from kvzip_press.leaderboard.samples.lengths import Frame
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter
from kvzip_press.leaderboard.samples.words import hex_ids, word_pairs

IDS = {"hex": hex_ids, "words": word_pairs}
_FRAME = Frame(joiner=",\n", head="The table:\n{\n", tail="\n}\n\nThat is all.")


@dataclass(frozen=True)
class KVRetrievalTask(GeneratedTask):
    """A table of which some keys are asked for; the others fill the context.

    Attributes:
        n_questions: Questions per context, each for the value of one key.
        n_pairs: Keys in the table, which then sits somewhere in prose; 0 for a table that fills the context.
        ids: The form of keys and values: "hex" (like a UUID) or "words" (two words).
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"ids": "words", "n_pairs": 4}}

    n_questions: int = 4
    n_pairs: int = 0
    ids: str = "hex"
    name: str = "kv_retrieval"

    def __post_init__(self) -> None:
        check_between(n_questions=(self.n_questions, 1, 1000), n_pairs=(self.n_pairs, 0, None))
        if self.n_pairs:
            check_between(n_pairs=(self.n_pairs, self.n_questions, None))
        check_name("ids", self.ids, IDS)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        ids = IDS[self.ids](rng)
        pairs = zip(ids, ids, strict=False)
        asked = list(islice(pairs, self.n_questions))
        lines = (_line(*pair) for pair in pairs)
        wanted = [_line(*pair) for pair in asked]
        made = bury_list(wanted, lines, rng, length_tokens, count_tokens, frame=_FRAME, n_units=self.n_pairs)
        questions = (_question(*pair, depth) for pair, depth in zip(asked, made.depths, strict=True))
        return Sample(f"{index:04d}", seed, made.text, tuple(questions))


def _line(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


def _question(key: str, value: str, depth: float) -> Question:
    return Question(
        question_id=key,
        text=f'What is the value of the key "{key}" in the table?',
        references=(value,),
        answer_prefix=f'{{\n"{key}": "',
        max_new_tokens=len(value),
        tags={"depth": depth},
    )
