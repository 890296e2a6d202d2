"""The configuration of a run (tasks, presses, ratios, a seed), and the list of contexts that follows from it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from kvzip_press import get_press
from kvzip_press.budget.amount import check_compression_ratio
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.options import check_name
from kvzip_press.leaderboard.rows.results import run_id
from kvzip_press.leaderboard.running.made_files import MadeFile
from kvzip_press.leaderboard.samples.task import Sample, Task, token_counter, version_of
from kvzip_press.press import Press
from kvzip_press.version import __version__

T = TypeVar("T")

ANSWER, AGREEMENT = "answer", "agreement"
"""What is measured of a task: its own metric of the answer, or how closely each cache follows the full one."""


@dataclass(frozen=True)
class PressSpec:
    """A press of a run.

    Attributes:
        name: Its name in the registry.
        label: The name in rows, tables and pictures.
        options: Further arguments of the press.
        compression_ratios: Fractions removed; None for the run's own. It is ``(0.0,)`` for a reference such as "none",
            and for a press whose options decide how much is kept (``budget``, ``layer_ratios``).
        files: Further arguments that are files made beforehand, by name.
    """

    name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    compression_ratios: tuple[float, ...] | None = None
    files: Mapping[str, MadeFile] = field(default_factory=dict)

    def press(self, **options: Any) -> Press:
        """Makes the press, with its options, its files and some more options.

        Raises:
            InvalidArgumentError: A file is not there or was changed, or an option is wrong.
            MissingDependencyError: A package is not installed.
        """
        for file in self.files.values():
            file.check()
        files: dict[str, Any] = {name: file.path for name, file in self.files.items()}
        return get_press(self.name, **self.options, **files, **options)


@dataclass(frozen=True)
class TaskSpec:
    """A task of a run.

    Attributes:
        task: The task.
        n_contexts: Number of contexts.
        length_tokens: Their length in tokens.
        measure: "answer" scores answers by the task's metric. "agreement" lets the full cache write ``max_new_tokens``
            tokens, sampled by the run's seed, and each press read them: the score is the share of next tokens whose
            most likely one is the same, and the rows' tags have ``kl_nats``, the mean KL divergence from the full
            cache's probabilities, and ``until_first``, the tokens until the first other. So small models, which solve
            nothing, compare presses too. Not for conversations (``multi_turn``).

    Raises:
        InvalidArgumentError: No such measure.
    """

    task: Task
    n_contexts: int
    length_tokens: int
    measure: str = ANSWER

    def __post_init__(self) -> None:
        check_name("a measure", self.measure, (AGREEMENT, ANSWER))


@dataclass(frozen=True)
class Run:
    """A whole configuration.

    Attributes:
        model_name: The name that the model was loaded by.
        tasks: The tasks to ask.
        presses: The presses; every press gets every context.
        compression_ratios: Fractions removed.
        seed: Seed of the samples.
        dtype: The dtype that the model was loaded in: "bf16", "fp16", "fp32", or "auto" for the checkpoint's.
        query_aware: Whether a context is compressed together with its question, which takes one prefill per question.
        truncate: Whether a context that is too long for the model loses its middle, instead of being refused.
        batch_size: Contexts of one task that are read in one padded forward pass. Rows do not depend on it, except for
            times and rounding.

    Raises:
        InvalidArgumentError: A value out of range, or two presses with the same label.
    """

    model_name: str
    tasks: tuple[TaskSpec, ...]
    presses: tuple[PressSpec, ...]
    compression_ratios: tuple[float, ...]
    seed: int = 0
    dtype: str = "auto"
    query_aware: bool = False
    truncate: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        _check_unique("presses of different labels", (press.label for press in self.presses))
        for press in self.presses:
            _check_unique("different compression ratios", map(check_compression_ratio, self.ratios(press)))
        least = min((self.batch_size, *(spec.n_contexts for spec in self.tasks)))
        if least < 1:
            raise InvalidArgumentError(f"expected a batch_size and numbers of contexts of at least 1, got {least}")

    @property
    def config(self) -> dict[str, Any]:
        """Returns all attributes and this package's version, as plain JSON values."""
        tasks = [
            {
                **{key: value for key, value in asdict(spec).items() if key != "measure"},
                "kind": type(spec.task).__name__,
                "data_revision": spec.task.data_revision,
                **({"version": version} if (version := version_of(spec.task)) != 1 else {}),  # runs of before had none
                **({"measure": spec.measure} if spec.measure != ANSWER else {}),  # the same
            }
            for spec in self.tasks
        ]
        presses = [
            {key: value for key, value in asdict(press).items() if key != "files" or value}  # runs of before had none
            for press in self.presses
        ]
        values = {**asdict(self), "tasks": tasks, "presses": presses, "kvzip_press": __version__}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain

    @property
    def run_id(self) -> str:
        """Hash of the configuration."""
        return run_id(self.config)

    def ratios(self, press: PressSpec) -> tuple[float, ...]:
        """Returns the fractions that one press removes."""
        return self.compression_ratios if press.compression_ratios is None else press.compression_ratios


@dataclass(frozen=True)
class Work:
    """One context of a run, and what is measured of it; see `TaskSpec`."""

    task: Task
    sample: Sample
    measure: str = ANSWER


def plan(run: Run, tokenizer: Any) -> list[Work]:
    """Returns all contexts of a run, with lengths counted by the model's tokenizer.

    The tasks are mixed evenly, so that a run that is stopped has done about the same part of each.

    Raises:
        InvalidArgumentError: A task without samples, a sample without questions, two with the same name, or a sample
            that is a conversation whose agreement is to be measured.
    """
    count_tokens, placed = token_counter(tokenizer), []
    for spec in run.tasks:
        samples = list(
            spec.task.samples(
                seed=run.seed, n=spec.n_contexts, length_tokens=spec.length_tokens, count_tokens=count_tokens
            )
        )
        _check_samples(spec, samples)
        placed += [
            ((index + 0.5) / len(samples), Work(spec.task, sample, spec.measure))
            for index, sample in enumerate(samples)
        ]
    _check_unique("samples of different names (give a task that is there twice a `name` of its own)", _names(placed))
    return [work for _, work in sorted(placed, key=lambda item: item[0])]


def count_rows(run: Run, works: Sequence[Work]) -> int:
    """Returns the number of rows that a run has."""
    cells = sum(len(run.ratios(press)) for press in run.presses)
    return cells * sum(len(work.sample.questions) for work in works)


def shard(works: Sequence[T], index: int, count: int) -> list[T]:
    """Returns every ``count``-th context from ``index`` on: a run's shards are disjoint, and together they are all.

    Raises:
        InvalidArgumentError: ``index`` is not in 0..count-1.
    """
    check_shard(index, count)
    return list(works[index::count])


def check_shard(index: int, count: int) -> None:
    """Raises InvalidArgumentError if ``index`` is not in 0..count-1."""
    if not 0 <= index < count:
        raise InvalidArgumentError(f"expected shard I/N with 0 <= I < N, got {index}/{count}")


def _names(placed: Iterable[tuple[float, Work]]) -> Iterable[str]:
    return (f"{work.task.name}/{work.sample.sample_id}" for _, work in placed)


def _check_samples(spec: TaskSpec, samples: Sequence[Sample]) -> None:
    task = spec.task
    if not samples:
        raise InvalidArgumentError(f"expected samples of the task {task.name!r}, got none: is its data set empty?")
    for sample in samples:
        if spec.measure == AGREEMENT and sample.multi_turn:
            raise InvalidArgumentError(
                f"expected measure: {AGREEMENT} of single questions, got a conversation, {task.name}/{sample.sample_id}"
            )
        if not sample.questions:
            raise InvalidArgumentError(f"expected questions in {task.name}/{sample.sample_id}, got none")
        where = f"questions of different names in {task.name}/{sample.sample_id}"
        _check_unique(where, (question.question_id for question in sample.questions))


def _check_unique(what: str, names: Iterable[object]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InvalidArgumentError(f"expected {what}, got {twice[0]!r} twice")
