"""The runner's forms: many contexts or questions at once, conversations, known questions, no context, long contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvzip_press import answer, compress, get_press
from kvzip_press.budget.allocators import Allocation, Decided
from kvzip_press.budget.policy import Policy
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.generation import generate
from kvzip_press.errors import BudgetMismatchError, InvalidArgumentError
from kvzip_press.leaderboard.rows.results import Row, run_id
from kvzip_press.leaderboard.running import measured, runner
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, Work, plan
from kvzip_press.leaderboard.samples.task import GeneratedTask, Question, Sample
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.presses.fastkvzip import Gates, LayerGate
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
MAKES_PRESSES = "kvzip_press.leaderboard.running.plan.get_press"
TIMES = ("prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds")
NONE, RANDOM = PressSpec("none", "full cache", compression_ratios=(0.0,)), PressSpec("random", "random")
KVZIP = PressSpec("kvzip", "kvzip", options={"chunk_size": 64})
TEXT = "The key of the red box is under the mat at the door. A dog sleeps by the bridge, and the baker opens early. "


@dataclass(frozen=True)
class LinesTask(GeneratedTask):
    """Contexts of different length, with questions, prefixes and bounds of different length."""

    name: str = "lines"
    multi_turn: bool = False
    context: str = TEXT
    n_questions: int = 3

    def _sample(self, seed: int, index: int, length_tokens: int, count_tokens: Any) -> Sample:
        questions = tuple(
            Question(
                question_id=f"q{number}",
                text=f"Where is{' it' * (number + index)}?",
                references=("65",),
                answer_prefix="It is" * (number % 2),
                max_new_tokens=(5, 2, 9)[number % 3],
                tags={"number": float(number)},
            )
            for number in range(self.n_questions)
        )
        return Sample(f"{index:04d}", seed, self.context[index * 27 % 100 :], questions, self.multi_turn)


@dataclass(frozen=True)
class NoSamples(LinesTask):
    """A data set without a row."""

    def samples(self, **options: Any) -> Iterator[Sample]:
        return iter(())


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def hybrid_or_not(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, num_layers=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=2)


def run_of(task: Any, *presses: PressSpec, n: int = 4, **options: Any) -> Run:
    return Run("tiny", (TaskSpec(task, n, 0),), presses or (NONE, RANDOM, KVZIP), (0.5, 0.9), **options)


def execute(run: Run, model: Any, **options: Any) -> list[Row]:
    return list(runner.execute(run, plan(run, TOKENIZER), model, TOKENIZER, **options))


def by_key(rows: Iterable[Row]) -> list[Row]:
    rows = [replace(row, run_id="", **dict.fromkeys(TIMES, 0.0)) for row in rows]
    return sorted(rows, key=lambda row: row.key)


# Many at once --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows_alone(hybrid_or_not: Any) -> Callable[[Run], list[Row]]:
    """The rows of a run whose contexts are read one by one."""
    known: dict[str, list[Row]] = {}

    def rows(run: Run) -> list[Row]:
        name = run_id(run.config)
        if name not in known:
            known[name] = by_key(execute(run, hybrid_or_not))
        return known[name]

    return rows


@pytest.mark.any_transformers
@pytest.mark.parametrize("multi_turn", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3, 9])
def test_rows_of_contexts_read_together_are_those_of_each_alone(
    hybrid_or_not: Any, rows_alone: Callable[[Run], list[Row]], batch_size: int, multi_turn: bool
) -> None:
    run = run_of(LinesTask(multi_turn=multi_turn))
    alone = rows_alone(run)
    assert len(alone) == 4 * 3 * 5
    assert len({row.n_context_tokens for row in alone}) == 4
    assert by_key(execute(replace(run, batch_size=batch_size), hybrid_or_not)) == alone


def test_a_batch_is_of_one_task_and_one_prefill(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(
        runner, "prefill", lambda *args, **options: sizes.append(len(args[2])) or prefill(*args, **options)
    )
    tasks = tuple(TaskSpec(LinesTask(name=name), n, 0) for name, n in (("a", 5), ("b", 3)))
    execute(replace(run_of(LinesTask(), NONE), tasks=tasks, batch_size=2), model)
    assert sorted(sizes) == [1, 1, 2, 2, 2]


def test_questions_asked_at_once_get_the_answers_that_each_gets_alone(
    hybrid_or_not: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = execute(run_of(LinesTask(n_questions=7), KVZIP, n=1), hybrid_or_not)
    monkeypatch.setattr(runner, "ASKED_AT_ONCE", 1)
    assert by_key(execute(run_of(LinesTask(n_questions=7), KVZIP, n=1), hybrid_or_not)) == by_key(rows)
    sample = next(LinesTask(n_questions=7).samples(seed=0, n=1, length_tokens=0))
    for ratio in (0.5, 0.9):
        cache = compress(hybrid_or_not, TOKENIZER, sample.context, get_press("kvzip", ratio, chunk_size=64))
        said = {row.question_id: row.prediction for row in rows if row.compression_ratio == ratio}
        for q in sample.questions:
            alone = answer(hybrid_or_not, TOKENIZER, cache, q.text, q.answer_prefix, q.max_new_tokens)
            assert said[q.question_id] == alone
    assert {row.n_answer_tokens for row in rows} == {5, 2, 9}
    assert rows[0].tags == {"number": 0.0}


def test_a_conversation_is_asked_in_turn_behind_its_own_answers(hybrid_or_not: Any) -> None:
    task = LinesTask(multi_turn=True)
    rows = execute(run_of(task, KVZIP, n=1), hybrid_or_not)
    single = execute(run_of(replace(task, multi_turn=False), KVZIP, n=1), hybrid_or_not)
    sample = next(task.samples(seed=0, n=1, length_tokens=0))
    cache = compress(hybrid_or_not, TOKENIZER, sample.context, get_press("kvzip", 0.5, chunk_size=64))
    said = [
        answer(hybrid_or_not, TOKENIZER, cache, q.text, q.answer_prefix, q.max_new_tokens, keep=True)
        for q in sample.questions
    ]
    assert [row.prediction for row in rows if row.compression_ratio == 0.5] == said
    assert said[0] == single[0].prediction
    if hybrid_or_not.config.model_type == "llama":  # the other tiny model says the same to everything
        assert said[1:] != [row.prediction for row in single[1:3]]
    assert rows[2].resident_bytes == single[2].resident_bytes  # of the context's cache, without the conversation


def test_what_is_missing_of_a_conversation_is_asked_behind_the_rest_of_it(model: Any) -> None:
    run = run_of(LinesTask(multi_turn=True), KVZIP, n=2, batch_size=2)
    rows = by_key(execute(run, model))
    missing = rows[2::5]
    done = {row.key for row in rows} - {row.key for row in missing}
    assert by_key(execute(run, model, done=done)) == missing


# Known questions -----------------------------------------------------------------------------------------------------


def test_a_query_aware_run_compresses_each_question_with_its_context(hybrid_or_not: Any) -> None:
    run = run_of(LinesTask(), RANDOM, n=2, query_aware=True)
    rows = execute(run, hybrid_or_not)
    assert all(row.query_aware for row in rows)
    assert len(rows) == 2 * 3 * 2
    q = next(LinesTask().samples(seed=0, n=1, length_tokens=0)).questions[1]
    cache = compress(hybrid_or_not, TOKENIZER, f"{TEXT}\n\n{q.text}", get_press("random", 0.9))
    ids = torch.tensor([[*TOKENIZER.encode("\n"), *TOKENIZER.encode(q.answer_prefix)]])
    [expected] = generate(hybrid_or_not, cache.fork(), ids, q.max_new_tokens, eos_ids={2})
    [row] = [row for row in rows if row.key[1:5] == ("0000", "q1", "random", 0.9)]
    assert row.prediction == TOKENIZER.decode(expected)
    assert (row.resident_bytes, row.n_context_tokens) == (cache.resident_bytes, cache.get_seq_length())
    assert by_key(execute(replace(run, batch_size=4), hybrid_or_not)) == by_key(rows)


def test_the_full_cache_answers_the_same_whether_the_question_was_known(model: Any) -> None:
    known, unknown = (execute(run_of(LinesTask(), NONE, query_aware=aware), model) for aware in (True, False))
    assert [row.prediction for row in by_key(known)] == [row.prediction for row in by_key(unknown)]


def test_a_line_of_heads_a_known_question(model: Any) -> None:
    told: list[Any] = []
    execute(run_of(LinesTask(), RANDOM, n=2, query_aware=True), model, on_heads=told.append)
    assert len({heads.key for heads in told}) == len(told) == 2 * 3 * 2


def test_a_conversation_has_no_query_aware_form(model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"single questions in a query-aware run, got .* lines/0000"):
        execute(run_of(LinesTask(multi_turn=True), query_aware=True), model)


# No context ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodingPress(RandomPress):
    """Stands for a press that evicts while decoding."""

    decoding: bool = False
    buffer: int = 0

    @property
    def schedule(self) -> Any:
        return SimpleNamespace(limit=(self.budget or 0) + self.buffer) if self.decoding else None


@pytest.fixture
def decoding_press(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(name: str, **options: Any) -> Any:
        return DecodingPress(**options) if name == "decoding" else get_press(name, **options)

    monkeypatch.setattr(MAKES_PRESSES, get)


def test_a_sample_without_a_context_is_written_in_the_press_context(model: Any, decoding_press: None) -> None:
    task = LinesTask(context="")
    press = PressSpec("decoding", "d", {"decoding": True, "budget": 12, "buffer": 10}, compression_ratios=(0.0,))
    rows = execute(run_of(task, NONE, press, n=2), model)
    assert len(rows) == 2 * 2 * 3
    q = next(task.samples(seed=0, n=1, length_tokens=0)).questions[2]
    prompt = [1, *TOKENIZER.encode(q.text), *TOKENIZER.encode("\n"), *TOKENIZER.encode(q.answer_prefix)]
    expected = tiny_model(num_layers=2).generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
    full, kept = (next(row for row in rows if row.key[:4] == ("lines", "0000", "q2", p)) for p in ("full cache", "d"))
    ids = [token for token in expected[0, len(prompt) :].tolist() if token != 2]
    assert full.prediction == TOKENIZER.decode(ids)
    assert full.n_context_tokens == len(prompt)
    assert full.kept_fraction == 1.0 > kept.kept_fraction


def test_gated_kvzip_answers_within_its_budget(model: Any, tmp_path: Path) -> None:
    """The real press: prompt and answer together outgrow the budget, the cache does not."""
    gates, generator = [], torch.Generator().manual_seed(0)
    for _ in full_attention_layers(model):
        gate = LayerGate(model.config.hidden_size, 2, model.config.num_attention_heads // 2)
        for parameter in gate.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        gates.append(gate)
    Gates(gates).save(tmp_path / "gates.safetensors")
    options = {"decoding": True, "budget": 6, "buffer": 2, "gate": str(tmp_path / "gates.safetensors")}
    press = PressSpec("fastkvzip", "gated", options, compression_ratios=(0.0,))
    for row in execute(run_of(LinesTask(context=""), press), model):
        assert row.n_context_tokens > 8
        assert row.kept_fraction * (row.n_context_tokens + max(row.n_answer_tokens - 1, 0)) <= 8


@pytest.mark.parametrize("options", [{}, {"decoding": True, "budget": 3}])
def test_only_what_evicts_while_decoding_and_within_its_budget_is_run(
    model: Any, decoding_press: None, options: dict[str, Any]
) -> None:
    press = PressSpec("decoding", "d", options, compression_ratios=(0.0,) if options else (0.5,))
    error, message = (
        (BudgetMismatchError, "d with budget 3: expected at most 28 pairs")
        if options
        else (InvalidArgumentError, "presses that evict while decoding .* got 'd'")
    )
    with pytest.raises(error, match=message):
        execute(run_of(LinesTask(context=""), press), model)


def test_a_press_that_cannot_answer_without_a_context_is_refused_before_anything_is_asked(model: Any) -> None:
    """Whichever task comes first: rows of a grid that has to be changed would be lost."""
    with_context, without = (
        run_of(LinesTask(name=name, context=text), NONE, RANDOM, n=1) for name, text in (("a", TEXT), ("b", ""))
    )
    run = replace(with_context, tasks=(*with_context.tasks, *without.tasks))
    rows = iter(runner.execute(run, plan(run, TOKENIZER), model, TOKENIZER))
    with pytest.raises(InvalidArgumentError, match="without a context, got 'random': give such tasks a grid of"):
        next(rows)


# What does not fit ---------------------------------------------------------------------------------------------------


def test_a_context_that_is_too_long_is_refused_or_loses_its_middle() -> None:
    model = tiny_model(num_layers=1, max_position_embeddings=100)
    run = run_of(LinesTask(), NONE, n=1)
    with pytest.raises(
        InvalidArgumentError, match=r"lines/0000: .* within the model's 100 positions, got 138; .*trunc"
    ):
        execute(run, model)
    for options in ({}, {"query_aware": True}):
        rows = execute(replace(run, truncate=True, **options), model)
        assert len(rows) == 3
        assert all(row.tags["truncated_tokens"] > 20 and row.n_context_tokens < 100 for row in rows)
    short = execute(replace(run, truncate=True), tiny_model(num_layers=1, max_position_embeddings=200))
    assert all("truncated_tokens" not in row.tags for row in short)


def test_what_is_left_of_a_long_context_is_its_two_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_model(num_layers=1, max_position_embeddings=100), []
    monkeypatch.setattr(runner, "prefill", lambda *args, **options: read.extend(args[2]) or prefill(*args, **options))
    [first, *_] = execute(run_of(LinesTask(), NONE, n=1, truncate=True), model)
    ids, whole = list(read[0]), TOKENIZER.encode(TEXT)
    half = len(ids) // 2
    assert ids == whole[: len(ids) - half] + whole[-half:]
    assert len(whole) - len(ids) == first.tags["truncated_tokens"]


@pytest.mark.parametrize("truncate", [False, True])
def test_a_question_longer_than_the_window_is_refused(truncate: bool) -> None:
    model = tiny_model(num_layers=1, max_position_embeddings=20)
    with pytest.raises(InvalidArgumentError, match=r"lines/0000: expected a question .* 20 positions, got"):
        execute(run_of(LinesTask(), NONE, truncate=truncate), model)


def test_a_run_of_nothing_or_of_two_with_one_name_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"samples of the task 'lines', got none: is its data set empty"):
        plan(run_of(NoSamples()), TOKENIZER)
    with pytest.raises(InvalidArgumentError, match=r"questions in lines/0000, got none"):
        plan(run_of(LinesTask(n_questions=0)), TOKENIZER)
    twice = replace(run_of(LinesTask()), tasks=(TaskSpec(LinesTask(), 1, 0), TaskSpec(LinesTask(), 1, 9)))
    with pytest.raises(InvalidArgumentError, match=r"a `name` of its own.* got 'lines/0000' twice"):
        plan(twice, TOKENIZER)
    with pytest.raises(InvalidArgumentError, match="presses of different labels, got 'random' twice"):
        run_of(LinesTask(), RANDOM, RANDOM)
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\), got 1.0"):
        replace(run_of(LinesTask()), compression_ratios=(1.0,))
    with pytest.raises(InvalidArgumentError, match=r"different compression ratios, got 0.5 twice"):
        replace(run_of(LinesTask()), compression_ratios=(0.5, 0.5))
    with pytest.raises(InvalidArgumentError, match="at least 1, got 0"):
        run_of(LinesTask(), batch_size=0)


# A cache that does not hold what was asked for -----------------------------------------------------------------------


def only(press: type[RandomPress], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MAKES_PRESSES, lambda name, compression_ratio: press(compression_ratio))


@dataclass(frozen=True)
class ProtectsAll(RandomPress):
    """Removes nothing, and says that everything is protected."""

    def score(self, prefill: Any) -> Any:
        return replace(super().score(prefill), protected=prefill.valid)


@dataclass(frozen=True)
class ProtectsHalf(RandomPress):
    """Keeps the first half, inside the budget or not."""

    inside: bool = True

    def score(self, prefill: Any) -> Any:
        half = prefill.valid & (prefill.positions < prefill.valid.shape[1] // 2)
        return replace(super().score(prefill), protected=half, protected_count=self.inside)


def test_a_press_that_evicts_nothing_fails_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only(ProtectsAll, monkeypatch)
    with pytest.raises(BudgetMismatchError, match=r"x at compression_ratio 0.5: expected pairs to be removed, got all"):
        execute(run_of(LinesTask(), PressSpec("x", "x")), model)


@pytest.mark.parametrize("inside", [True, False])
def test_protected_pairs_explain_what_is_kept_beyond_the_ratio(
    model: Any, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.setattr(
        MAKES_PRESSES,
        lambda name, compression_ratio: ProtectsHalf(compression_ratio, inside=inside),
    )
    kept = [row.kept_fraction for row in execute(run_of(LinesTask(), PressSpec("x", "x"), n=1), model)]
    expected = [0.5, 0.5] if inside else [0.75, 0.55]
    assert kept[::3] == pytest.approx(expected, abs=0.01)


def test_a_cache_of_another_ratio_fails_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evict = runner.Prefill.evict
    monkeypatch.setattr(runner.Prefill, "evict", lambda self, scores: evict(self, scores, 0.3))
    with pytest.raises(BudgetMismatchError, match=r"random at .* 0.5: expected \d+ of \d+ pairs kept \(0.5\d+\), got"):
        execute(run_of(LinesTask(), RANDOM), model)


@dataclass(frozen=True)
class DecidesAll(RandomPress):
    """Decides counts that the cache then does not have."""

    def score(self, prefill: Any) -> Any:
        scores = super().score(prefill)
        counts = {i: torch.full(layer.shape[:2], 10) for i, layer in scores.layers.items()}
        return replace(scores, policy=Policy(self.amount, Decided(per_head=counts)))


def test_a_press_that_decides_is_held_to_its_own_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only(DecidesAll, monkeypatch)
    press = PressSpec("x", "x")
    rows = execute(run_of(LinesTask(), press, n=1), model)
    assert {row.kept_fraction for row in rows} == {(10 + 4) / len([1, *TOKENIZER.encode(TEXT)])} or len(rows) == 6
    keep = measured._asked_pairs
    monkeypatch.setattr(measured, "_asked_pairs", lambda *args: keep(*args) + 1)
    with pytest.raises(BudgetMismatchError, match=r"x at compression_ratio 0.5"):
        execute(run_of(LinesTask(), press), model)


def test_bytes_that_no_kept_pair_needs_fail_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that only looks smaller: its packed keys are a view of a tensor of all."""
    evict = runner.Prefill.evict

    def hoarding(self: Any, scores: Any) -> RaggedCache:
        cache = evict(self, scores)
        packed = cache.layers[0].packed
        keys = packed.columns["keys"]
        larger = torch.cat([keys, keys])[: keys.shape[0]]
        cache.layers[0].packed = replace(packed, columns={**packed.columns, "keys": larger})
        return cache

    monkeypatch.setattr(runner.Prefill, "evict", hoarding)
    with pytest.raises(BudgetMismatchError, match=r"expected a cache of \d+ pairs in \d+ bytes, got one that holds"):
        execute(run_of(LinesTask(), RANDOM), model)


def test_measured_bytes_are_those_that_the_storages_have(hybrid_or_not: Any) -> None:
    run = run_of(LinesTask(), RANDOM, n=1)
    [work] = [Work(LinesTask(), sample) for sample in LinesTask().samples(seed=0, n=1, length_tokens=0)]
    done = prefill(hybrid_or_not, TOKENIZER, work.sample.context)
    for row in execute(run, hybrid_or_not)[::3]:
        cache = done.evict(RandomPress().score(done), row.compression_ratio)
        assert (row.resident_bytes, row.dense_bytes) == (cache.resident_bytes, done.dense_bytes)


@dataclass(frozen=True)
class FirstTen(Allocation):
    """Keeps ten pairs a head, whatever the amount: how much is an outcome of its rule."""

    def counts(self, row: Any, amount: Any) -> Any:
        return {i: counts + 10 for i, counts in row.no_counts().items()}


def test_an_allocation_with_a_rule_of_its_own_is_measured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        MAKES_PRESSES,
        lambda name, compression_ratio: RandomPress(compression_ratio, allocation=FirstTen()),
    )
    rows = execute(run_of(LinesTask(), PressSpec("x", "x"), n=1), model)
    assert {row.kept_fraction for row in rows} == {(10 + 4) / len([1, *TOKENIZER.encode(TEXT)])} or len(rows) == 6


def test_allocations_with_arguments_are_run_and_checked(model: Any) -> None:
    """Whole pages leave less than a page of the budget; what a tolerance keeps is its outcome, at ratio 0."""

    def spec(label: str, allocation: Any, **options: Any) -> PressSpec:
        return PressSpec("random", label, options={"allocation": allocation, "n_sink": 0}, **options)

    presses = (
        NONE,
        spec("pages", {"name": "pages", "page_size": 16}),
        spec("line", "pyramid"),
        spec("tolerance", {"name": "tolerance", "tolerance": 0.3}, compression_ratios=(0.0,)),
    )
    rows = execute(run_of(LinesTask(), *presses, n=2), model)
    kept = {(row.press, row.compression_ratio): row.kept_fraction for row in rows}
    assert 0 < kept["tolerance", 0.0] < 1 and kept["full cache", 0.0] == 1
    for ratio in (0.5, 0.9):
        assert kept["line", ratio] == pytest.approx(1 - ratio, abs=0.01)
        assert 1 - ratio - 0.1 < kept["pages", ratio] <= 1 - ratio + 0.01
