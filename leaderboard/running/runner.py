"""The loop over contexts: a prefill per context, a scoring per press, an eviction per ratio, a fork per question."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar, cast

import torch

from kvzip_press import get_press, prefill
from kvzip_press.budget.amount import Ratio
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.answering import ASKED_AT_ONCE, answer_ids, decoded, question_ids
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row, RowKey
from kvzip_press.leaderboard.running.contexts import Context, batches, contexts_of
from kvzip_press.leaderboard.running.decode_phase import Writing, Written, check_decodes
from kvzip_press.leaderboard.running.endpoint import Endpoint
from kvzip_press.leaderboard.running.following_contexts import FullReply
from kvzip_press.leaderboard.running.measured import Measured, check_kept, measure
from kvzip_press.leaderboard.running.plan import AGREEMENT, PressSpec, Run, Work
from kvzip_press.leaderboard.running.provenance import provenance
from kvzip_press.leaderboard.samples.task import version_of
from kvzip_press.model.devices import input_device, timed
from kvzip_press.model.structure import max_positions
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import Press

T = TypeVar("T")


@dataclass(frozen=True)
class _Cell:
    """One compressed cache: contexts under a press and a ratio. Seconds are per context."""

    press: PressSpec
    compression_ratio: float
    cache: RaggedCache
    rows: Sequence[Measured]
    prefill_seconds: float
    score_seconds: float
    evict_seconds: float


@dataclass(frozen=True)
class _Asked:
    """A question of a context: the context's index in its batch, and the question's in its context."""

    row: int
    number: int


def execute(
    run: Run,
    works: Iterable[Work],
    model: Any,
    tokenizer: Any,
    *,
    done: Container[RowKey] = frozenset(),
    on_row: Callable[[Row], None] | None = None,
    on_heads: Callable[[HeadBudgets], None] | None = None,
    endpoint: Endpoint | None = None,
) -> Iterator[Row]:
    """Yields the rows of a run: context by context, press by press, ratio by ratio, question by question.

    Args:
        run: What to run.
        works: The run's contexts, from `plan`, all or some of them.
        model: The model that ``run.model_name`` names.
        tokenizer: Its tokenizer.
        done: Keys of existing rows. Only a context's missing rows are computed.
        on_row: Called with each row before it is yielded (for a progress bar).
        on_heads: Called with what the heads of each compressed context kept, before its rows.
        endpoint: A server that answers; None for the model itself.

    Raises:
        InvalidArgumentError: An unknown press, a context that does not fit the model, or a server that does not answer.
        BudgetMismatchError: A cache does not hold what was asked for.
    """
    loop, works = _Loop(run, model, tokenizer, done, on_heads, endpoint), list(works)
    if any(not work.sample.context for work in works):
        loop.check_decoding()
    limit = max_positions(model)
    contexts = (context for work in works for context in contexts_of(work, run, tokenizer, limit))
    for batch in batches(filter(loop.lacks, contexts), run.batch_size):
        for row in loop.rows(batch):
            if on_row is not None:
                on_row(row)
            yield row


class _Loop:
    """The state that all contexts of a run share. Presses hold no state of a run, so each is made once."""

    def __init__(
        self,
        run: Run,
        model: Any,
        tokenizer: Any,
        done: Container[RowKey],
        on_heads: Callable[[HeadBudgets], None] | None,
        endpoint: Endpoint | None,
    ) -> None:
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.run_id, self.provenance, self.endpoint = run.run_id, provenance(model), endpoint
        if endpoint is not None:
            self.provenance = {**self.provenance, "executor": "openai"}
        self.done, self.on_heads = done, on_heads
        self.shapes_seen: set[tuple[int, int, int]] = set()
        self.presses = {
            (spec.label, ratio): spec.press(compression_ratio=ratio)
            for spec in run.presses
            for ratio in run.ratios(spec)
        }

    def lacks(self, context: Context) -> bool:
        """Returns whether any row of a context is missing."""
        return bool(self._wanted([context]))

    def check_decoding(self) -> None:
        """Raises InvalidArgumentError if a press cannot answer where there is no context, before anything is asked."""
        for (label, ratio), press in self.presses.items():
            check_decodes(label, press, keeps_all=ratio == 0 and isinstance(press.amount, Ratio))

    def rows(self, batch: Sequence[Context]) -> Iterator[Row]:
        """Yields the missing rows of contexts that are read together."""
        wanted = self._wanted(batch)
        if not batch[0].ids:
            yield from self._written(batch[0], wanted)
            return
        prefilled = prefill(
            self.model, self.tokenizer, [context.ids for context in batch], observers=self._watching(wanted)
        )
        replies = self._replies(batch, prefilled)
        for spec, group in groupby(wanted, key=lambda cell: cell[0]):
            for cell in self._cells(prefilled, spec, [ratio for _, ratio in group]):
                self._tell_heads(batch, cell)
                yield from self._followed(batch, cell, replies) if replies else self._answers(batch, cell)

    def _wanted(self, batch: Sequence[Context]) -> list[tuple[PressSpec, float]]:
        cells = ((spec, ratio) for spec in self.run.presses for ratio in self.run.ratios(spec))
        return [(spec, ratio) for spec, ratio in cells if self._missing(batch, spec, ratio)]

    def _missing(self, batch: Sequence[Context], spec: PressSpec, ratio: float) -> list[_Asked]:
        return [
            _Asked(row, number)
            for row, context in enumerate(batch)
            for number in range(len(context.questions))
            if self._key(context, number, spec, ratio) not in self.done
        ]

    def _key(self, context: Context, number: int, spec: PressSpec, ratio: float) -> RowKey:
        return RowKey(
            task=context.work.task.name,
            sample_id=context.work.sample.sample_id,
            question_id=context.questions[number].question_id,
            press=spec.label,
            compression_ratio=ratio,
            query_aware=self.run.query_aware,
        )

    def _watching(self, wanted: Sequence[tuple[PressSpec, float]]) -> list[Press]:
        """Returns the presses that observe the prefill: one for all ratios if it only scores, else one per ratio.

        Several observers of one forward pass are cheaper than several passes.
        """
        watching = []
        for _, group in groupby(wanted, key=lambda cell: cell[0]):
            presses = [self.presses[spec.label, ratio] for spec, ratio in group]
            watching += presses[:1] if presses[0].is_scorer else presses
        return watching

    def _cells(self, prefilled: Prefill, spec: PressSpec, ratios: Sequence[float]) -> Iterator[_Cell]:
        n_rows = prefilled.valid.shape[0]
        shared: tuple[Scores, float] | None = None
        for ratio in ratios:
            press = self.presses[spec.label, ratio]
            scores, score_seconds = shared or self._timed(press.score, prefilled)
            if not scores.is_decided:
                shared = scores, score_seconds
                scores = scores.asked_for(ratio) if isinstance(press.amount, Ratio) else scores
            cache, evict_seconds = self._timed(prefilled.evict, scores)
            rows = measure(cache, prefilled.valid)
            check_kept(spec.label, ratio, scores, rows)
            seconds = (part / n_rows for part in (prefilled.seconds, score_seconds, evict_seconds))
            yield _Cell(spec, ratio, cache, rows, *seconds)

    def _tell_heads(self, batch: Sequence[Context], cell: _Cell) -> None:
        if self.on_heads is None:
            return
        for context, measured in zip(batch, cell.rows, strict=True):
            self.on_heads(
                HeadBudgets(
                    run_id=self.run_id,
                    task=context.work.task.name,
                    sample_id=context.work.sample.sample_id,
                    press=cell.press.label,
                    compression_ratio=cell.compression_ratio,
                    layer_idx=tuple(measured.kept),
                    kept=measured.kept_fractions,
                    question_id=context.questions[0].question_id if self.run.query_aware else "",
                )
            )

    def _replies(self, batch: Sequence[Context], prefilled: Prefill) -> dict[_Asked, FullReply]:
        """Returns what the full cache writes to each question; empty where answers are scored by their task."""
        if batch[0].work.measure != AGREEMENT:
            return {}
        full = prefilled.evict(get_press("none").score(prefilled))
        return {
            _Asked(row, number): FullReply.of(
                self.model,
                _rows_of(full, [row]),
                question_ids(self.tokenizer, context.texts[number], question.answer_prefix),
                question.max_new_tokens,
                seed=context.work.sample.seed,
            )
            for row, context in enumerate(batch)
            for number, question in enumerate(context.questions)
        }

    def _followed(self, batch: Sequence[Context], cell: _Cell, replies: Mapping[_Asked, FullReply]) -> Iterator[Row]:
        """Compares a cache with the full one along what that wrote."""
        for asked in self._missing(batch, cell.press, cell.compression_ratio):
            full = replies[asked]
            agreement, likeliest = full.followed_by(self.model, _rows_of(cell.cache, [asked.row]))
            row = self._row(batch[asked.row], asked.number, cell, cell.rows[asked.row], likeliest, None)
            yield replace(
                row,
                score=agreement.share,
                references=(decoded(self.tokenizer, full.written),),
                tags={**row.tags, **agreement.tags},
            )

    def _answers(self, batch: Sequence[Context], cell: _Cell) -> Iterator[Row]:
        missing = self._missing(batch, cell.press, cell.compression_ratio)
        single = [asked for asked in missing if not batch[asked.row].work.sample.multi_turn]
        for start in range(0, len(single), ASKED_AT_ONCE):
            yield from self._asked_at_once(batch, cell, single[start : start + ASKED_AT_ONCE])
        for row, group in groupby((asked for asked in missing if asked not in single), key=lambda asked: asked.row):
            yield from self._asked_in_turn(batch[row], cell, row, {asked.number for asked in group})

    def _asked_at_once(self, batch: Sequence[Context], cell: _Cell, asked: Sequence[_Asked]) -> Iterator[Row]:
        """Asks questions of any of the contexts as the rows of one batch, which share the packed contexts."""
        questions = [batch[one.row].questions[one.number] for one in asked]

        texts = [batch[one.row].texts[one.number] for one in asked]
        prefixes = [question.answer_prefix for question in questions]

        def ask(cache: RaggedCache, bounds: Sequence[int]) -> list[list[int]]:
            return answer_ids(self.model, self.tokenizer, cache, texts, prefixes, bounds)

        bounds = [question.max_new_tokens for question in questions]
        if self.endpoint is not None:
            press = self.presses[cell.press.label, cell.compression_ratio]
            answers, seconds = self._timed(self.endpoint.answers, cell.cache, press, texts, prefixes, bounds)
            for one, ids in zip(asked, answers, strict=True):
                yield self._row(batch[one.row], one.number, cell, cell.rows[one.row], ids, seconds / len(asked))
            return
        rows, shape = [one.row for one in asked], (len(batch), len(asked), max(bounds))
        if input_device(self.model).type == "cuda" and shape not in self.shapes_seen:
            self.shapes_seen.add(shape)
            ask(_rows_of(cell.cache, rows), bounds)  # compiles kernels, the graph's too, outside the timing
        answers, seconds = self._timed(ask, _rows_of(cell.cache, rows), bounds)
        for one, ids in zip(asked, answers, strict=True):
            yield self._row(batch[one.row], one.number, cell, cell.rows[one.row], ids, seconds / len(asked))

    def _asked_in_turn(self, context: Context, cell: _Cell, row: int, missing: Container[int]) -> Iterator[Row]:
        """Asks a whole conversation from its beginning; yields only the rows that are missing."""
        cache = _rows_of(cell.cache, [row])
        for number, question in enumerate(context.questions):
            (ids,), seconds = self._timed(
                lambda number=number, question=question: answer_ids(
                    self.model,
                    self.tokenizer,
                    cache,
                    context.texts[number],
                    question.answer_prefix,
                    question.max_new_tokens,
                    keep=True,
                )
            )
            if number in missing:
                yield self._row(context, number, cell, cell.rows[row], ids, seconds)

    def _written(self, context: Context, wanted: Sequence[tuple[PressSpec, float]]) -> Iterator[Row]:
        """Asks the questions of a sample without a context."""
        writing = Writing(self.model, self.tokenizer, context)
        for spec, ratio in wanted:
            press = self.presses[spec.label, ratio]
            for asked in self._missing([context], spec, ratio):
                found = writing.under(spec.label, press, asked.number)
                cell = _Cell(spec, ratio, found.cache, [found.measured], 0.0, 0.0, 0.0)
                row = self._row(context, asked.number, cell, found.measured, found.ids, found.seconds)
                row = replace(row, n_context_tokens=found.n_prompt, tags={**row.tags, **found.tags})
                yield row if found.score is None else self._agreeing(row, found)

    def _agreeing(self, row: Row, found: Written) -> Row:
        """Returns a row whose answer is compared with the full cache's."""
        assert found.score is not None and found.references is not None
        return replace(row, score=found.score, references=(decoded(self.tokenizer, found.references),))

    def _row(
        self, context: Context, number: int, cell: _Cell, measured: Measured, ids: Sequence[int], seconds: float | None
    ) -> Row:
        question, work = context.questions[number], context.work
        prediction = decoded(self.tokenizer, ids)
        return Row(
            **self._key(context, number, cell.press, cell.compression_ratio)._asdict(),
            run_id=self.run_id,
            model=self.run.model_name,
            kept_fraction=measured.kept_fraction,
            seed=work.sample.seed,
            prediction=prediction,
            references=question.references,
            score=work.task.score(prediction, question),
            n_context_tokens=measured.n_tokens,
            n_answer_tokens=len(ids),
            resident_bytes=measured.resident_bytes,
            dense_bytes=measured.dense_bytes,
            prefill_seconds=cell.prefill_seconds,
            score_seconds=cell.score_seconds,
            evict_seconds=cell.evict_seconds,
            answer_seconds=seconds,
            tags={**question.tags, **context.tags},
            provenance={**self.provenance, "data_revision": work.task.data_revision},
            task_version=version_of(work.task),
            question=question.text,
            storage=cell.cache.storage,
        )

    def _timed(self, function: Callable[..., T], *arguments: Any) -> tuple[T, float]:
        return timed(input_device(self.model), function, *arguments)


def _rows_of(cache: RaggedCache, rows: Sequence[int]) -> RaggedCache:
    """Forks a cache so that its batch rows continue from the given rows; they share the packed pairs."""
    fork = cache.fork()
    fork.reorder_cache(cast("torch.LongTensor", torch.tensor(rows)))
    return fork
