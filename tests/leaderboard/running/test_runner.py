"""One prefill a context, one scoring a press, one eviction a ratio; every question from one cache."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kvzip_press.budget.allocators import Decided
from kvzip_press.budget.policy import Policy
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.running import runner
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, count_rows, plan
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ByteTokenizer, tiny_model

PRESSES = (
    PressSpec("none", "full cache", compression_ratios=(0.0,)),
    PressSpec("random", "random", options={"seed": 3}),
    PressSpec("kvzip", "KVzip", options={"chunk_size": 128}),
)
MAKES_PRESSES = "kvzip_press.leaderboard.running.plan.get_press"
TIMES = ("prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def run() -> Run:
    tasks = (
        TaskSpec(get_task("hidden_facts", n_keys=2, max_new_tokens=1), n_contexts=2, length_tokens=250),
        TaskSpec(get_task("profile_qa", n_people=1, n_attributes=3, max_new_tokens=1), n_contexts=1, length_tokens=250),
    )
    return Run("tiny", tasks, PRESSES, (0.5, 0.9), seed=5)


@pytest.fixture(scope="module")
def rows(run: Run, model: Any) -> list[Any]:
    return execute(run, model)


def without_times(rows: list[Any]) -> list[Any]:
    return [replace(row, run_id="", **dict.fromkeys(TIMES, 0.0)) for row in rows]


def execute(run: Run, model: Any, **options: Any) -> list[Any]:
    return list(runner.execute(run, plan(run, ByteTokenizer()), model, ByteTokenizer(), **options))


def test_every_question_meets_every_press_at_every_ratio_once(run: Run, rows: list[Any]) -> None:
    assert len(rows) == count_rows(run, plan(run, ByteTokenizer())) == (1 + 2 + 2) * (2 * 2 + 3)
    names = {(row.task, row.sample_id, row.question_id, row.press, row.compression_ratio) for row in rows}
    assert len(names) == len(rows)
    assert {row.run_id for row in rows} == {run.run_id}
    assert all(row.provenance["dtype"] == "float32" and row.seed == 5 for row in rows)


def test_measured_figures_follow_the_asked_ratio(rows: list[Any]) -> None:
    for row in rows:
        assert row.kept_fraction == pytest.approx(1 - row.compression_ratio, abs=0.02)
        assert row.resident_bytes / row.dense_bytes == pytest.approx(row.kept_fraction, rel=0.1)
        assert all(getattr(row, name) >= 0 for name in TIMES)


def test_rows_carry_the_storage_and_the_bytes_that_it_takes(run: Run, model: Any) -> None:
    """Measured and checked as in the model's dtype: the pairs that are kept are the same."""
    presses = [PressSpec("random", name, {"seed": 3, "storage": name}) for name in ("model", "int8", "k8v4")]
    alone = replace(run, tasks=run.tasks[1:], presses=tuple(presses), compression_ratios=(0.5,))
    by_storage = {row.storage: row for row in execute(alone, model)}
    assert [row.press for row in by_storage.values()] == list(by_storage) == ["model", "int8", "k8v4"]
    assert len({row.kept_fraction for row in by_storage.values()}) == 1
    sizes = [row.resident_bytes for row in by_storage.values()]
    assert sizes[0] > 3 * sizes[1] > 3 * sizes[2] > 0  # of fp32
    assert Row.from_json(by_storage["int8"].to_json()).storage == "int8"
    assert summarise(by_storage.values())[1].compression == pytest.approx(row_ratio(by_storage["int8"]))


def row_ratio(row: Any) -> float:
    ratio: float = row.dense_bytes / row.resident_bytes
    return ratio


def test_one_prefill_a_context_and_one_scoring_a_press(run: Run, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"prefill": 0, "score": 0}
    prefill, score = runner.prefill, RandomPress.score

    def counted_prefill(*args: Any, **options: Any) -> Any:
        calls["prefill"] += 1
        return prefill(*args, **options)

    def counted_score(self: RandomPress, done: Any) -> Any:
        calls["score"] += 1
        return score(self, done)

    monkeypatch.setattr(runner, "prefill", counted_prefill)
    monkeypatch.setattr(RandomPress, "score", counted_score)
    execute(run, model)
    assert calls == {"prefill": 3, "score": 3 * 2}  # "none" is scored by the same method


def test_rows_do_not_depend_on_the_other_presses_or_their_order(run: Run, model: Any, rows: list[Any]) -> None:
    backwards = without_times(execute(replace(run, presses=PRESSES[::-1]), model))
    alone = without_times(execute(replace(run, presses=PRESSES[2:]), model))
    for spec in PRESSES:
        wanted = [row for row in without_times(rows) if row.press == spec.label]
        assert [row for row in backwards if row.press == spec.label] == wanted
    assert alone == [row for row in without_times(rows) if row.press == PRESSES[2].label]


def test_shuffled_presses_ratios_and_contexts_give_the_same_set_of_rows(run: Run, model: Any, rows: list[Any]) -> None:
    order = random.Random(1)
    presses, ratios, works = list(run.presses), list(run.compression_ratios), plan(run, ByteTokenizer())
    for items in (presses, ratios, works):
        order.shuffle(items)
    shuffled = replace(run, presses=tuple(presses), compression_ratios=tuple(ratios))
    found = runner.execute(shuffled, works, model, ByteTokenizer())
    assert by_key(found) == by_key(rows)


def by_key(rows: Iterable[Any]) -> list[Any]:
    return sorted(without_times(list(rows)), key=lambda row: row.key)


def test_on_row_is_told_of_each_row_in_order(run: Run, model: Any) -> None:
    told: list[Any] = []
    assert execute(replace(run, presses=PRESSES[:1]), model, on_row=told.append) == told


def test_contexts_of_the_tasks_are_mixed_evenly(run: Run) -> None:
    run = replace(run, tasks=(replace(run.tasks[0], n_contexts=4), replace(run.tasks[1], n_contexts=2)))
    names = [work.task.name for work in plan(run, ByteTokenizer())]
    assert names == ["hidden_facts", "profile_qa", "hidden_facts", "hidden_facts", "profile_qa", "hidden_facts"]


def test_the_run_id_names_the_whole_configuration(run: Run) -> None:
    others = [
        replace(run, seed=6),
        replace(run, model_name="other"),
        replace(run, compression_ratios=(0.5,)),
        replace(run, presses=PRESSES[:2]),
        replace(run, tasks=run.tasks[:1]),
        replace(run, tasks=(replace(run.tasks[0], task=get_task("hidden_facts", n_keys=3)),)),
    ]
    assert len({run.run_id, *(other.run_id for other in others)}) == 1 + len(others)
    assert replace(run).run_id == run.run_id


def test_an_unknown_press_is_refused_before_anything_runs(
    run: Run, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "prefill", lambda *args, **options: pytest.fail("ran"))
    with pytest.raises(InvalidArgumentError, match="did you mean 'kvzip'"):
        execute(replace(run, presses=(PressSpec("kvzipp", "x"),)), model)


@dataclass(frozen=True)
class OwnBudgetPress(RandomPress):
    """Decides its own counts, so that its scores are good for its own ratio only."""

    is_scorer = False

    def score(self, prefill: Any) -> Any:
        scores = super().score(prefill)
        n_kept = round((1 - self.compression_ratio) * prefill.valid.shape[1]) - int(scores.protected.sum())
        counts = {i: torch.full(layer.shape[:2], n_kept) for i, layer in scores.layers.items()}
        return replace(scores, policy=Policy(self.amount, Decided(per_head=counts)))


@pytest.mark.parametrize(
    ("press", "scorings", "watching"), [(OwnBudgetPress, 6, [2, 2, 2]), (RandomPress, 3, [1, 1, 1])]
)
def test_a_press_that_decides_its_own_budget_watches_and_scores_once_a_ratio(
    run: Run, model: Any, monkeypatch: pytest.MonkeyPatch, press: Any, scorings: int, watching: list[int]
) -> None:
    scored, watched = [], []
    prefill, score = runner.prefill, press.score
    monkeypatch.setattr(MAKES_PRESSES, lambda name, compression_ratio: press(compression_ratio))
    monkeypatch.setattr(
        runner,
        "prefill",
        lambda *args, observers: watched.append(len(observers)) or prefill(*args, observers=observers),
    )
    monkeypatch.setattr(press, "score", lambda self, done: scored.append(self.compression_ratio) or score(self, done))
    for row in execute(replace(run, presses=(PressSpec("x", "x"),)), model):
        assert row.kept_fraction == pytest.approx(1 - row.compression_ratio, abs=0.02)
    assert len(scored) == scorings
    assert watched == watching
