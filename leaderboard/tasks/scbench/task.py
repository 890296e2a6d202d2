"""SCBench (arXiv 2412.10319) as KVzip prepared it: one context, several questions, each asked of the context alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.metrics import originals
from kvzip_press.leaderboard.metrics.code import repoqa
from kvzip_press.leaderboard.options import check_name
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Presets, Question

METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "choice_eng": originals.first_line_contains,
    "kv": originals.contains,
    "many_shot": originals.option,
    "mf": originals.exactly,
    "passkey": originals.contains,
    "prefix_suffix": originals.contains,
    "qa_eng": originals.f1_or_contains,
    "summary": originals.rouge_l,
    "vt": originals.part_contained,
}
"""Kind of question -> metric; only "repoqa" is missing, because its metric needs the language too."""

MAX_NEW_TOKENS = {"mf": 32, "repoqa": 512, "repoqa_and_kv": 512, "summary": 256, "summary_with_needles": 256}
SUBSETS = (*(kind for kind in METRICS if kind != "passkey"), "repoqa", "repoqa_and_kv", "summary_with_needles")
SIZES = ("", "tiny", "short", "mid")
ONE_SIZE = ("choice_eng", "qa_eng", "vt")


@dataclass(frozen=True)
class SCBenchTask(HubTask):
    """One of SCBench's sets, given by the task's name, such as "scbench_kv".

    Attributes:
        size: "" for contexts of about 26 to 170 thousand tokens, else "tiny" (8 thousand), "short" (20) or "mid" (60).
    """

    presets: ClassVar[Presets] = {"default": {}, **{size: {"size": size} for size in SIZES[1:]}}

    size: str = ""
    name: str = "scbench_kv"

    def __post_init__(self) -> None:
        check_name("a task of SCBench", self.name, [f"scbench_{subset}" for subset in SUBSETS])
        check_name("a size", self.size, SIZES)
        if self.size and self.subset in ONE_SIZE:
            raise InvalidArgumentError(f"expected no size for {self.name}, which has one only, got {self.size!r}")

    @property
    def subset(self) -> str:
        """The set's name in SCBench."""
        return self.name.removeprefix("scbench_")

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        columns: tuple[str, ...] = ("prompts", "ground_truth")
        columns += ("lang",) if "repoqa" in self.subset else ()
        columns += ("task",) if self.subset in {"repoqa_and_kv", "summary_with_needles"} else ()
        file = f"{self.name}_{self.size}.parquet" if self.size else f"{self.name}.parquet"
        return HubFiles("Jang-Hyun/SCBench-preprocessed", file, columns)

    def score(self, prediction: str, question: Question) -> float:
        """Returns the metric of the question's kind; see README.md."""
        if question.tags["kind"] == "repoqa":
            return repoqa(prediction, question.references, str(question.tags["language"]))
        return METRICS[str(question.tags["kind"])](prediction, question.references)

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        (row,) = rows
        context, *asked = row.texts("prompts") or ("",)
        mixed = "task" in self.files.columns
        kinds = [_kind(task) for task in row.texts("task")] if mixed else [self.subset] * len(asked)
        golds = [", ".join(gold) for gold in row.list_of_references("ground_truth", numbers=True)]
        if not asked or not len(asked) == len(kinds) == len(golds):
            n_each = f"{len(asked)}, {len(kinds)} and {len(golds)}"
            raise InvalidArgumentError(f"{row.place}: expected as many tasks and answers as questions, got {n_each}")
        functions = [gold for gold, kind in zip(golds, kinds, strict=True) if kind == "repoqa"]
        return context, [
            Question(
                question_id=f"{index:03d}",
                text=f"Q: {text}",
                references=_references(kind, text, gold, functions),
                max_new_tokens=MAX_NEW_TOKENS.get(self.subset, 96),
                tags={"kind": kind, **({"language": row.text("lang")} if kind == "repoqa" else {})},
            )
            for index, (kind, text, gold) in enumerate(zip(kinds, asked, golds, strict=True))
        ]


def _kind(task: str) -> str:
    """Returns the kind of a question in the two mixed sets."""
    return next((kind for kind in ("repoqa", "summary", "kv") if kind in task), "passkey")


def _references(kind: str, asked: str, text: str, functions: Sequence[str]) -> tuple[str, ...]:
    """Returns the references as in KVzip's evaluation."""
    if kind == "repoqa":  # the right function first, then those it could be confused with
        return (text, *(function for function in functions if function != text))
    if kind == "many_shot":  # the gold is a letter; the reference is the whole line of the option
        return tuple(line.strip() for line in asked.split("\n") if f"({text})" in line)[:1] or (text,)
    return tuple(text.split(", ")) if kind == "vt" else (text,)
