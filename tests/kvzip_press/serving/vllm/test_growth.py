"""What the soak of `make test-vllm` makes of memory that it notes."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from growth import N_STRETCHES, growth

N_REQUESTS = 2000


def test_the_mean_is_what_was_added_and_the_interval_is_students() -> None:
    steady = growth([5e8 + 400 * 200 * number for number in range(N_STRETCHES + 1)], N_REQUESTS)
    assert (steady.mean, steady.half_width) == (400, 0)
    added = [0, 20_000] * 5  # 0 and 100 bytes a request
    found = growth([0, *accumulate(added)], N_REQUESTS)
    assert found.mean == 50
    assert found.half_width == pytest.approx(2.262 * 52.7046 / 10**0.5, rel=1e-4)
    assert str(found) == "50 ± 38 bytes a request"


def test_growth_in_steps_is_not_taken_for_none() -> None:
    """Of what is lost, a page of 2 MB is taken now and then: a median sees nothing, the upper end does."""
    one_step = growth([0, *accumulate([0] * 9 + [2_000_000])], N_REQUESTS)
    assert one_step.mean == 1000 and one_step.high > 3000


def test_the_interval_holds_what_is_lost_about_as_often_as_it_says() -> None:
    drawn, lost, held = random.Random(0), 700, 0
    for _ in range(2000):
        noted = [0, *accumulate(drawn.gauss(lost * 200, 50_000) for _ in range(N_STRETCHES))]
        found = growth(noted, N_REQUESTS)
        held += abs(found.mean - lost) <= found.half_width
    assert 0.93 < held / 2000 < 0.97


def test_another_number_of_notes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 11 notes, got 3"):
        growth([1, 2, 3], N_REQUESTS)
