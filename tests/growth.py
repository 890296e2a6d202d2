"""How fast memory grows, from what was noted between stretches of equal work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

N_STRETCHES = 10
_T = 2.262  # 97.5 % of Student's t, for N_STRETCHES - 1 degrees of freedom


@dataclass(frozen=True)
class Growth:
    """Bytes a request: the mean over stretches, and a 95 % interval of it.

    A median would not see what grows by a page now and then. A fitted line would take notes for independent, and levels
    of memory are not, since what was taken once stays; what is added in one stretch does not depend on the one before.
    """

    mean: float
    half_width: float

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half_width

    def __str__(self) -> str:
        return f"{self.mean:.0f} ± {self.half_width:.0f} bytes a request"


def growth(noted: Sequence[float], n_requests: int) -> Growth:
    """Returns the growth over N_STRETCHES stretches of equally many requests.

    Args:
        noted: Bytes, before the first stretch and after each.
        n_requests: Requests of all stretches together.
    """
    if len(noted) != N_STRETCHES + 1:
        raise ValueError(f"expected {N_STRETCHES + 1} notes, got {len(noted)}")
    added = [(after - before) * N_STRETCHES / n_requests for before, after in pairwise(noted)]
    return Growth(mean(added), _T * stdev(added) / math.sqrt(N_STRETCHES))
