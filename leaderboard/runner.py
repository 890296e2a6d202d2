"""The loop: a context is prefilled once and scored once a press; every ratio is an eviction, every question a fork."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kvzip_press import __version__, answer, get_press, prefill
from kvzip_press.compat import TRANSFORMERS_VERSION
from kvzip_press.leaderboard.plan import PressSpec, Run, Work
from kvzip_press.leaderboard.results import Row
from kvzip_press.leaderboard.task import Question
from kvzip_press.prefilling import Prefill, synchronize
from kvzip_press.press import Press
from kvzip_press.ragged_cache import RaggedCache
from kvzip_press.scores import Scores

T = TypeVar("T")


@dataclass(frozen=True)
class _Cell:
    """One compressed cache: a context under a press and a ratio."""

    press: PressSpec
    compression_ratio: float
    cache: RaggedCache
    score_seconds: float
    evict_seconds: float


def execute(
    run: Run, works: Iterable[Work], model: Any, tokenizer: Any, *, on_row: Callable[[Row], None] | None = None
) -> Iterator[Row]:
    """Yields the rows of a run: context by context, press by press, ratio by ratio, question by question.

    Args:
        run: What to run.
        works: Its contexts, from `plan`; may end early.
        model: The model that ``run.model_name`` names.
        tokenizer: Its tokenizer.
        on_row: Is told of each row before it is yielded (for a progress bar).
    """
    loop = _Loop(run, model, tokenizer)
    for work in works:
        for row in loop.rows(work):
            if on_row is not None:
                on_row(row)
            yield row


def provenance(model: Any) -> dict[str, str]:
    """What a measurement depends on beside its configuration."""
    parameter = next(model.parameters())
    return {
        "kvzip_press": __version__,
        "torch": str(torch.__version__),
        "transformers": str(TRANSFORMERS_VERSION),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
    }


class _Loop:
    """What stays the same over the contexts of a run. Presses hold no state of a run, so each is made once."""

    def __init__(self, run: Run, model: Any, tokenizer: Any) -> None:
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.run_id, self.provenance = run.run_id, provenance(model)
        self.presses = {
            (spec.label, ratio): get_press(spec.name, compression_ratio=ratio, **spec.options)
            for spec in run.presses
            for ratio in run.ratios(spec)
        }
        self.any_ratio: set[str] = set()  # labels of presses whose scores were seen to serve every ratio

    def rows(self, work: Work) -> Iterator[Row]:
        done = prefill(self.model, self.tokenizer, work.sample.context, observers=self._watching())
        for spec in self.run.presses:
            for cell in self._cells(done, spec):
                for question in work.sample.questions:
                    yield self._row(work, done, cell, question)

    def _watching(self) -> list[Press]:
        """One press for every ratio where that is known to do, else one a ratio: watching is cheaper than a forward."""
        return [
            self.presses[spec.label, ratio]
            for spec in self.run.presses
            for ratio in self.run.ratios(spec)[: 1 if spec.label in self.any_ratio else None]
        ]

    def _cells(self, done: Prefill, spec: PressSpec) -> Iterator[_Cell]:
        shared: tuple[Scores, float] | None = None
        for ratio in self.run.ratios(spec):
            scores, score_seconds = shared or self._timed(self.presses[spec.label, ratio].score, done)
            if not scores.is_decided:
                shared = scores, score_seconds
                self.any_ratio.add(spec.label)
            cache, evict_seconds = self._timed(done.evict, scores, ratio)
            yield _Cell(spec, ratio, cache, score_seconds, evict_seconds)

    def _row(self, work: Work, done: Prefill, cell: _Cell, question: Question) -> Row:
        assert done.input_ids is not None
        prediction, answer_seconds = self._timed(
            answer,
            self.model,
            self.tokenizer,
            cell.cache,
            question.text,
            question.answer_prefix,
            question.max_new_tokens,
        )
        return Row(
            run_id=self.run_id,
            task=work.task.name,
            model=self.run.model_name,
            press=cell.press.label,
            compression_ratio=cell.compression_ratio,
            kept_fraction=cell.cache.kept_fraction,
            sample_id=work.sample.sample_id,
            question_id=question.question_id,
            seed=work.sample.seed,
            prediction=prediction,
            references=question.references,
            score=work.task.score(prediction, question),
            query_aware=False,
            n_context_tokens=int(done.input_ids.shape[1]),
            n_answer_tokens=len(self.tokenizer.encode(prediction, add_special_tokens=False)),
            resident_bytes=cell.cache.resident_bytes,
            dense_bytes=done.dense_bytes,
            prefill_seconds=done.seconds,
            score_seconds=cell.score_seconds,
            evict_seconds=cell.evict_seconds,
            answer_seconds=answer_seconds,
            tags=dict(question.tags),
            provenance=self.provenance,
        )

    def _timed(self, function: Callable[..., T], *arguments: Any) -> tuple[T, float]:
        device = next(self.model.parameters()).device
        synchronize(device)
        begin = time.perf_counter()
        value = function(*arguments)
        synchronize(device)
        return value, time.perf_counter() - begin
