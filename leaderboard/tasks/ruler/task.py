"""RULER (arXiv 2404.06654) as kvpress hosts it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvzip_press.leaderboard.metrics.originals import ruler_all, ruler_any
from kvzip_press.leaderboard.options import check_name
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask, by_context
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Presets, Question

SUBSETS = (
    "cwe", "fwe", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery", "niah_multivalue",
    "niah_single_1", "niah_single_2", "niah_single_3", "qa_1", "qa_2", "vt",
)  # fmt: skip


@dataclass(frozen=True)
class RULERTask(HubTask):
    """All thirteen subsets, or one of them; a question's tag "subset" names the one that it is from.

    Attributes:
        data_dir: The folder of the data set: the length of its contexts in Llama 3 tokens, "4096", "8192" or "16384".
        subset: One of `SUBSETS`, or "" for all.
    """

    presets: ClassVar[Presets] = {"default": {}, "8k": {"data_dir": "8192"}, "16k": {"data_dir": "16384"}}

    data_dir: str = "4096"
    subset: str = ""
    name: str = "ruler"
    revision: str = "24adceac8a0e6532936e8d721cd9e9084d2e4686"

    def __post_init__(self) -> None:
        if self.subset:
            check_name("a subset of RULER", self.subset, SUBSETS)

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        columns = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")
        return HubFiles("simonjegou/ruler", f"{self.data_dir}/test-*.parquet", columns)

    def score(self, prediction: str, question: Question) -> float:
        """Returns the fraction of the references in the answer; in the QA subsets, 1.0 if any is."""
        metric = ruler_any if str(question.tags["subset"]).startswith("qa") else ruler_all
        return metric(prediction, question.references)

    def _documents(self) -> list[list[Record]]:
        return by_context([row for row in self.rows if self.subset in {"", row.text("task")}])

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        return rows[0].text("context"), [
            Question(
                question_id=f"{row.text('task')}/{index}",
                text=row.text("question"),
                references=row.references("answer"),
                answer_prefix=row.text("answer_prefix"),
                max_new_tokens=row.number("max_new_tokens"),
                tags={"subset": row.text("task")},
            )
            for index, row in enumerate(rows)
        ]
