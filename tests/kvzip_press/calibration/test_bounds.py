"""Bounds on a rate by finitely many trials: exact, and true as often as they say."""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest

from kvzip_press.calibration.bounds import binomial_tail, most_failures, n_needed, n_passed

pytestmark = pytest.mark.any_transformers

ROWS = Path(__file__).resolve().parents[3] / "leaderboard" / "results" / "smollm2-full" / "rows.jsonl.gz"
DELTA = 0.05


@pytest.mark.parametrize("rate", [Fraction(1, 100), Fraction(1, 20), Fraction(1, 2), Fraction(9, 10)])
def test_the_tail_is_that_of_the_binomial_distribution_to_the_last_digits(rate: Fraction) -> None:
    for n in (1, 7, 60, 299):
        exact = Fraction(0)
        for k in range(n + 1):
            exact += comb(n, k) * rate**k * (1 - rate) ** (n - k)
            assert binomial_tail(k, n, float(rate)) == pytest.approx(float(exact), rel=1e-11)


def test_the_tail_is_scipys_for_many_trials() -> None:
    binom = pytest.importorskip("scipy.stats").binom
    for k in (0, 3, 40, 900, 1100):
        assert binomial_tail(k, 100_000, 0.01) == pytest.approx(binom.cdf(k, 100_000, 0.01), rel=1e-9)


def test_so_many_trials_are_needed_and_so_many_may_fail() -> None:
    assert n_needed(0.01, 0.05) == 299  # 0.99 ** 299 is the first power below 0.05
    assert [0.99**298 > 0.05, 0.99**299 <= 0.05] == [True, True]
    assert (n_needed(0.5, 0.5), n_needed(0.05, 0.05), n_needed(0.01, 0.025)) == (1, 59, 368)
    assert [most_failures(n, 0.01, 0.05) for n in (298, 299, 472, 473, 627, 628)] == [-1, 0, 0, 1, 1, 2]


def test_a_sequence_ends_at_the_first_step_that_fails_whatever_comes_behind_it() -> None:
    assert n_passed([0, 1, 1, 2, 0], 473, 0.01, DELTA) == 3
    assert n_passed([2, 0, 0], 473, 0.01, DELTA) == 0
    assert n_passed([0, 0], 473, 0.01, DELTA) == 2


def share_of_true_bounds(losses: np.ndarray, n: int, max_loss: float, *, draws: int = 1000, seed: int = 0) -> float:
    """How often the chosen step's true rate is within the bound, over calibrations on rows that are drawn anew.

    ``losses`` is ``[rows, steps]``, 0 or 1; its rows are the population, so the true rate of a step is its mean.
    """
    rng = np.random.default_rng(seed)
    true = [0.0, *losses.mean(axis=0)]
    held = 0
    for _ in range(draws):
        failures = losses[rng.integers(len(losses), size=n)].sum(axis=0)
        held += true[n_passed(failures.tolist(), n, max_loss, DELTA)] <= max_loss
    return held / draws


def test_the_bound_holds_in_95_of_100_calibrations_where_the_rate_is_just_above_it() -> None:
    """The hardest table: every step's rate is the least above the bound, so each one that passes is wrong."""
    n_rows, max_loss = 2000, 0.05
    above = round(max_loss * n_rows) + 1
    rng = np.random.default_rng(1)
    alike = np.zeros((n_rows, 9))
    alike[rng.permutation(n_rows)[:above]] = 1
    apart = np.stack([rng.permutation(alike[:, 0]) for _ in range(9)], axis=1)
    for losses in (alike, apart):
        for n in (59, 93, 300):
            assert share_of_true_bounds(losses, n, max_loss) >= 1 - DELTA - 0.02  # three standard errors of 1000 draws
    # and without the order, choosing the largest step that passes by itself, it does not hold
    counts = [apart[rng.integers(n_rows, size=59)].sum(axis=0) for _ in range(1000)]
    assert np.mean([not (failures <= most_failures(59, max_loss, DELTA)).any() for failures in counts]) < 0.8


def changed_answers(press: str) -> np.ndarray:
    """``[contexts, ratios]``: whether an answer about a context is not the full cache's, in a run of ours."""
    answers: dict[tuple[str, float], dict[tuple[str, str, str], str]] = defaultdict(dict)
    with gzip.open(ROWS, "rt", encoding="utf-8") as file:
        wanted = [f'"press": "{name}"' for name in ("full cache", press)]
        for row in (json.loads(line) for line in file if any(text in line for text in wanted)):
            question = (row["task"], row["sample_id"], row["question_id"])
            answers[row["press"], row["compression_ratio"]][question] = row["prediction"]
    full = answers["full cache", 0.0]
    ratios = sorted(ratio for name, ratio in answers if name == press)
    contexts = sorted({question[:2] for question in full})
    changed = {context: [0] * len(ratios) for context in contexts}
    for number, ratio in enumerate(ratios):
        for question, said in answers[press, ratio].items():
            changed[question[:2]][number] |= said != full[question]
    return np.array([changed[context] for context in contexts])


@pytest.mark.parametrize("press", ["kvzip", "snapkv"])
def test_the_bound_holds_in_95_of_100_calibrations_on_answers_of_a_real_run(press: str) -> None:
    losses = changed_answers(press)
    rates = losses.mean(axis=0)
    assert len(losses) > 100
    for max_loss in (0.1, 0.3, float(rates[len(rates) // 2]) - 1e-9):
        assert share_of_true_bounds(losses, 150, max_loss) >= 1 - DELTA - 0.02


def test_random_tables_keep_the_bound_too() -> None:
    chance = random.Random(4)
    for seed in range(8):
        rates = sorted(chance.uniform(0, 0.3) for _ in range(6))
        losses = np.random.default_rng(seed).random((1500, 6)) < np.array(rates)
        assert share_of_true_bounds(losses, 80, 0.1, draws=300, seed=seed) >= 1 - DELTA - 0.04
