"""Bounds on a rate of failures by n independent trials, exact for every n, and the test of a fixed sequence by them.

Learn then Test (Angelopoulos, Bates, Candes, Jordan, Lei: arXiv 2110.01052) turns the choice of a parameter into tests
of the hypotheses "the loss at this parameter is above the bound", each with a p-value that holds for finite samples.
Here a loss is 0 or 1, so the binomial tail is such a p-value, and no smaller one is. Where the parameters are tested in
an order that was fixed before, and testing ends at the first that fails, each may be tested at the full level: the
chance that any of those that passed is above the bound is at most ``delta``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def binomial_tail(n_failures: int, n: int, rate: float) -> float:
    """Returns the probability of at most ``n_failures`` failures in ``n`` independent trials that fail at ``rate``.

    Args:
        n_failures: 0 to ``n``.
        n: Number of trials.
        rate: In (0, 1).
    """
    return min(1.0, math.fsum(_probability(k, n, rate) for k in range(n_failures + 1)))


def n_needed(max_rate: float, delta: float) -> int:
    """Returns the least number of trials of which none fails that bound a rate by ``max_rate``."""
    n = max(1, math.ceil(math.log(delta) / math.log1p(-max_rate)) - 1)
    while binomial_tail(0, n, max_rate) > delta:
        n += 1
    return n


def most_failures(n: int, max_rate: float, delta: float) -> int:
    """Returns the most failures of ``n`` trials that still bound a rate by ``max_rate``; -1 if none may fail."""
    tails = itertools.accumulate(_probability(k, n, max_rate) for k in range(n))
    return sum(1 for _ in itertools.takewhile(lambda tail: tail <= delta, tails)) - 1


def n_passed(failures: Sequence[int], n: int, max_rate: float, delta: float) -> int:
    """Returns how many first steps of a fixed sequence pass: up to the first whose rate may be above ``max_rate``.

    Args:
        failures: Failures of the same ``n`` trials at each step, in an order that was fixed before they were run.
        n: Number of trials.
        max_rate: The bound, in (0, 1).
        delta: Probability with which a step that passes may be above the bound, in (0, 1).
    """
    limit = most_failures(n, max_rate, delta)
    return next((number for number, failed in enumerate(failures) if failed > limit), len(failures))


def _probability(k: int, n: int, rate: float) -> float:
    """Returns the probability of just ``k`` failures."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(rate) + (n - k) * math.log1p(-rate))
