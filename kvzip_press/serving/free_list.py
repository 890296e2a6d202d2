"""Which stretches of an arena are free."""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeList:
    """The free stretches of ``size`` places, in order; neighbours are one stretch.

    Args:
        size: Number of places, all free at first.
    """

    def __init__(self, size: int) -> None:
        self._stretches = [(0, size)] if size else []  # (begin, end), ascending

    @property
    def n_free(self) -> int:
        """Number of free places."""
        return sum(end - begin for begin, end in self._stretches)

    @property
    def longest(self) -> int:
        """Length of the longest free stretch."""
        return max((end - begin for begin, end in self._stretches), default=0)

    def take(self, n: int) -> int | None:
        """Takes ``n`` >= 0 places out of the shortest stretch that has them; returns the first, or None without one."""
        fitting = [(end - begin, begin) for begin, end in self._stretches if end - begin >= n]
        if n == 0 or not fitting:
            return 0 if n == 0 else None
        length, begin = min(fitting)
        index = bisect_left(self._stretches, (begin,))
        self._stretches[index : index + 1] = [] if length == n else [(begin + n, begin + length)]
        return begin

    def give(self, begin: int, n: int) -> None:
        """Gives places back that were taken: ``n`` from ``begin`` on."""
        if n == 0:
            return
        insort(self._stretches, (begin, begin + n))
        joined: list[tuple[int, int]] = []
        for start, end in self._stretches:
            if joined and joined[-1][1] >= start:
                assert joined[-1][1] == start, "a stretch that was free is given back"
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._stretches = joined

    def copy(self) -> FreeList:
        """Returns a list of its own with the same stretches."""
        twin = FreeList(0)
        twin._stretches = list(self._stretches)
        return twin
