"""The protocol of a task: samples made from a seed, and a score for an answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.metrics import substring_match
from kvzip_press.model.text import encode

TokenCounter = Callable[[str], int]
"""Counts the tokens of a text; generated contexts get their length in these."""

Presets = Mapping[str, Mapping[str, Any]]
"""Name of a difficulty -> the fields of the task that it sets."""


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes:
        question_id: Unique inside its sample.
        text: The question, as it is put to the model.
        references: The accepted answers, any of which is enough; for tasks that say so, answers that must all be named.
        answer_prefix: How the answer starts; the model continues from there. May be empty.
        max_new_tokens: The most tokens that are generated.
        tags: Further values for its rows, such as ``{"depth": 0.25}``; a metric may need them too.

    Raises:
        InvalidArgumentError: The references are a single text, which metrics would read letter by letter, or one of
            them is no text.
    """

    question_id: str
    text: str
    references: tuple[str, ...]
    answer_prefix: str = ""
    max_new_tokens: int = 32
    tags: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: object = self.references
        if not isinstance(given, tuple) or not all(isinstance(one, str) for one in given):
            raise InvalidArgumentError(f"expected references as a tuple of texts, got {given!r:.80}")


@dataclass(frozen=True)
class Sample:
    """One context, prefilled once, and all questions that are asked about it.

    Attributes:
        sample_id: Unique inside its task, seed and length; the same arguments give the same sample in every run.
        seed: The seed that the sample was made from.
        context: The text.
        questions: At least one.
        multi_turn: Whether the questions form a conversation, each asked after the earlier questions and answers;
            otherwise each is asked of the context alone.
    """

    sample_id: str
    seed: int
    context: str
    questions: tuple[Question, ...]
    multi_turn: bool = False


def token_counter(tokenizer: Any) -> TokenCounter:
    """Returns the function that counts the tokens of a text as a tokenizer does, without any that it adds."""
    return lambda text: len(encode(tokenizer, text))


def approximate_tokens(text: str) -> int:
    """Estimates the tokens of English prose in a usual byte-pair vocabulary, at 4.5 characters per token."""
    return round(len(text) / 4.5)


@runtime_checkable
class Task(Protocol):
    """A family of samples and their metric. Tasks are frozen dataclasses whose fields are the difficulty.

    A task whose samples or metric change, so that scores from before and after cannot be compared, says so by an
    attribute ``version``, an integer; see `version_of`.
    """

    @property
    def name(self) -> str:
        """The name in the table of tasks and in every row."""
        ...

    @property
    def data_revision(self) -> str:
        """The data that samples are made of: a data set's commit, or "generated" if they are made from a seed."""
        ...

    def samples(
        self, *, seed: int, n: int, length_tokens: int, count_tokens: TokenCounter = approximate_tokens
    ) -> Iterator[Sample]:
        """Yields `n` samples; sample ``i`` depends only on ``i`` and the other arguments, so a larger `n` only adds.

        Args:
            seed: Any integer.
            n: Number of contexts.
            length_tokens: Wanted length of a context, without the chat template.
            count_tokens: Counts tokens; give the model's own counter if the length must be exact.

        Raises:
            InvalidArgumentError: What is asked for does not fit into the length.
        """
        ...

    def score(self, prediction: str, question: Question) -> float:
        """Returns how right an answer is, in [0, 1]."""
        ...


def version_of(task: Task) -> int:
    """Returns the version of a task, which stands in each of its rows; that of a task which says none is 1."""
    version: int = getattr(task, "version", 1)
    return version


class GeneratedTask(ABC):
    """A task whose samples are made one by one from a seed, and ask for a value that is in the context."""

    name: str
    data_revision = "generated"
    version = 1
    presets: ClassVar[Presets] = {"default": {}, "smollm2": {}}

    def samples(
        self, *, seed: int, n: int, length_tokens: int, count_tokens: TokenCounter = approximate_tokens
    ) -> Iterator[Sample]:
        """See `Task.samples`."""
        for index in range(n):
            try:
                yield self._sample(seed, index, length_tokens, count_tokens)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"task {self.name!r}: {error}") from error

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the value is in the answer."""
        return substring_match(prediction, question.references)

    @abstractmethod
    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        """Makes sample ``index``, which depends on these arguments alone."""
