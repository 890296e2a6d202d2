"""LongBench (arXiv 2308.14508), English and code, as kvpress hosts it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.metrics.originals import code_line, f1, numbers_right, right_class, rouge_l
from kvzip_press.leaderboard.options import check_name
from kvzip_press.leaderboard.samples.hub import HubFiles
from kvzip_press.leaderboard.samples.hub_task import HubTask
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.leaderboard.samples.task import Question

METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "2wikimqa": f1,
    "gov_report": rouge_l,
    "hotpotqa": f1,
    "lcc": code_line,
    "multi_news": rouge_l,
    "multifieldqa_en": f1,
    "musique": f1,
    "narrativeqa": f1,
    "passage_count": numbers_right,
    "passage_retrieval_en": numbers_right,
    "qasper": f1,
    "qmsum": rouge_l,
    "repobench-p": code_line,
    "samsum": rouge_l,
    "triviaqa": f1,
}
_FIRST_LINE = {"samsum", "trec", "triviaqa"}  # few-shot prompts: what follows a line break is the next example


@dataclass(frozen=True)
class LongBenchTask(HubTask):
    """One of LongBench's sets, given by the task's name, such as "longbench_qasper"."""

    name: str = "longbench_qasper"
    revision: str = "2e9ade51ebf45d98942056c0716234f9d5d257d5"

    def __post_init__(self) -> None:
        check_name("a task of LongBench", self.name, [f"longbench_{subset}" for subset in (*METRICS, "trec")])

    @property
    def subset(self) -> str:
        """LongBench's own name for the set."""
        return self.name.removeprefix("longbench_")

    @property
    def files(self) -> HubFiles:
        """See `HubData.files`."""
        columns = ("context", "question", "answer_prefix", "answers", "all_classes", "max_new_tokens")
        return HubFiles("Xnhyacinth/LongBench", f"{self.subset}/test-*.parquet", columns)

    def score(self, prediction: str, question: Question) -> float:
        """Returns the set's own metric, for the best reference."""
        if self.subset in _FIRST_LINE:
            prediction = prediction.lstrip().partition("\n")[0]
        if self.subset == "trec":
            return right_class(prediction, question.references, str(question.tags["classes"]).split("\n"))
        return METRICS[self.subset](prediction, question.references)

    def _sample(self, rows: Sequence[Record]) -> tuple[str, list[Question]]:
        (row,) = rows
        return row.text("context"), [
            Question(
                question_id="only",
                text=row.text("question"),
                references=row.references("answers"),
                answer_prefix=row.text("answer_prefix"),
                max_new_tokens=row.number("max_new_tokens"),
                tags={"classes": "\n".join(row.texts("all_classes"))} if self.subset == "trec" else {},
            )
        ]
