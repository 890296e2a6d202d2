"""What a run is made of: tasks, presses, ratios and a seed; and the list of contexts that follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvzip_press import __version__
from kvzip_press.leaderboard.results import run_id
from kvzip_press.leaderboard.task import Sample, Task


@dataclass(frozen=True)
class PressSpec:
    """A press of a run.

    Attributes:
        name: Its name in the registry.
        label: What rows, table and picture call it.
        options: Its further arguments.
        compression_ratios: Fractions removed; None for the run's own. A reference such as "none" has ``(0.0,)``.
    """

    name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    compression_ratios: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TaskSpec:
    """A task of a run: how many contexts, and of how many tokens."""

    task: Task
    n_contexts: int
    length_tokens: int


@dataclass(frozen=True)
class Run:
    """A whole configuration.

    Attributes:
        model_name: What the model was loaded as.
        tasks: What is asked.
        presses: Every one meets every context.
        compression_ratios: Fractions removed.
        seed: Of the samples.
    """

    model_name: str
    tasks: tuple[TaskSpec, ...]
    presses: tuple[PressSpec, ...]
    compression_ratios: tuple[float, ...]
    seed: int = 0

    @property
    def run_id(self) -> str:
        """The hash of everything above and of this package's version."""
        return run_id({**asdict(self), "kvzip_press": __version__})

    def ratios(self, press: PressSpec) -> tuple[float, ...]:
        """The fractions that one press removes."""
        return self.compression_ratios if press.compression_ratios is None else press.compression_ratios


@dataclass(frozen=True)
class Work:
    """One context of a run."""

    task: Task
    sample: Sample


def plan(run: Run, tokenizer: Any) -> list[Work]:
    """All contexts of a run, their lengths counted by the model's tokenizer.

    The tasks are mixed evenly, so that a run that is stopped has done about the same part of each.
    """

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    placed = [
        ((index + 0.5) / spec.n_contexts, Work(spec.task, sample))
        for spec in run.tasks
        for index, sample in enumerate(
            spec.task.samples(
                seed=run.seed, n=spec.n_contexts, length_tokens=spec.length_tokens, count_tokens=count_tokens
            )
        )
    ]
    return [work for _, work in sorted(placed, key=lambda item: item[0])]


def count_rows(run: Run, works: Sequence[Work]) -> int:
    """How many rows a run has."""
    cells = sum(len(run.ratios(press)) for press in run.presses)
    return cells * sum(len(work.sample.questions) for work in works)
