"""Bases of presses whose last tokens stay: those that only keep some, and those whose queries also decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding.decode_press import DecodePress


@dataclass(frozen=True)
class RecentPress(DecodePress):
    """A press whose last tokens stay, which have no other part in it.

    Args:
        n_recent: Number of last tokens that no eviction takes (0), fewer than the budget.

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: ``n_recent`` is negative, or no less than the budget.
    """

    n_recent: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.n_recent < 0:
            raise InvalidArgumentError(f"{type(self).__name__}: expected n_recent >= 0, got {self.n_recent}")
        super().__post_init__()

    @property
    def recent(self) -> int:
        """The last tokens that stay."""
        return self.n_recent


@dataclass(frozen=True)
class WindowPress(DecodePress):
    """A press with a window: last tokens that stay, and whose queries say what else does, pooled over neighbours.

    Args:
        window_size: Number of last queries, and of last tokens that stay; fewer than the budget.
        kernel_size: Number of neighbouring pairs that are pooled, an odd number.

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    least_window: ClassVar[int] = 1

    window_size: int = field(kw_only=True)
    kernel_size: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.window_size < self.least_window or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise InvalidArgumentError(
                f"{type(self).__name__}: expected window_size >= {self.least_window} and an odd kernel_size, got "
                f"{self.window_size} and {self.kernel_size}"
            )
        super().__post_init__()

    @property
    def recent(self) -> int:
        """The window."""
        return self.window_size

    @property
    def n_queries(self) -> int | None:
        """The window."""
        return self.window_size
