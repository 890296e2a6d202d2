"""Tasks on real code: a context of functions without their docstrings, and questions for the one that does something.

The form of RepoQA (arXiv 2406.06025), with the authors' own docstrings as descriptions, and the function's name as the
answer instead of its whole text.
"""

from __future__ import annotations

import ast
import random
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.options import check_between
from kvzip_press.leaderboard.samples.haystack import needle_depths
from kvzip_press.leaderboard.samples.task import GeneratedTask, Presets, Question, Sample, TokenCounter

LEAST_WORDS, MOST_WORDS, MOST_LINES = 6, 60, 40


@dataclass(frozen=True)
class Function:
    """A function: its name, what its author says that it does, and its source without that."""

    name: str
    description: str
    source: str


@dataclass(frozen=True)
class FunctionTask(GeneratedTask):
    """The base class: functions in an order that the seed draws, as many as fit; no two have one name.

    Attributes:
        n_questions: Questions per context, each for another function.
    """

    presets: ClassVar[Presets] = {"default": {}, "smollm2": {"n_questions": 4}}

    n_questions: int = 8
    name: str = ""

    def __post_init__(self) -> None:
        check_between(n_questions=(self.n_questions, 1, 100))

    @property
    @abstractmethod
    def functions(self) -> Sequence[Function]:
        """All functions; loaded when they are first needed, with an error if they are not there."""

    def score(self, prediction: str, question: Question) -> float:
        """Returns 1.0 if the answer begins with the function's name, as a whole."""
        found = re.match(r"\W*(\w+)", prediction)
        return float(found is not None and found[1] in question.references)

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: TokenCounter) -> Sample:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        room, chosen = length_tokens, []
        for one in rng.sample(self.functions, len(self.functions)):
            n = count_tokens(f"{one.source}\n\n")
            if n > room:
                break
            room -= n
            chosen.append(one)
        if len(chosen) < self.n_questions:
            raise InvalidArgumentError(
                f"expected length_tokens for {self.n_questions} functions or more, got "
                f"{length_tokens}, with room for {len(chosen)}: give more, or ask fewer"
            )
        context = "\n\n".join(one.source for one in chosen)
        asked = rng.sample(range(len(chosen)), self.n_questions)
        starts = [sum(len(one.source) + 2 for one in chosen[:place]) for place in asked]
        depths = needle_depths(context, starts, count_tokens)
        questions = (_question(chosen[place], depth) for place, depth in zip(asked, depths, strict=True))
        return Sample(f"{index:04d}", seed, context, tuple(questions))


def functions_in(source: str) -> Iterator[Function]:
    """Yields the functions of a module that have a description which does not name them."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and (found := _described(node, source)):
            yield found


def one_a_name(functions: Iterable[Function]) -> tuple[Function, ...]:
    """Returns the functions whose name and whose description no other has."""
    known = list(functions)
    names, said = ([getattr(one, field) for one in known] for field in ("name", "description"))
    return tuple(one for one in known if names.count(one.name) == said.count(one.description) == 1)


def _described(node: ast.FunctionDef, source: str) -> Function | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or node.decorator_list:
        return None
    description = " ".join(re.split(r"\n\s*\n|\n\s*>>>", docstring)[0].split())
    if not LEAST_WORDS <= len(description.split()) <= MOST_WORDS or node.name.lower() in description.lower():
        return None
    lines, said = source.splitlines(), node.body[0]
    kept = [*lines[node.lineno - 1 : said.lineno - 1], *lines[said.end_lineno or said.lineno : node.end_lineno]]
    text = "\n".join(kept).rstrip()
    return Function(node.name, description, text) if len(kept) <= MOST_LINES else None


def _question(function: Function, depth: float) -> Question:
    return Question(
        question_id=function.name,
        text=f"Which of the functions above does this?\n{function.description}",
        references=(function.name,),
        answer_prefix="The function is `",
        max_new_tokens=4 + len(function.name),
        tags={"depth": depth},
    )
