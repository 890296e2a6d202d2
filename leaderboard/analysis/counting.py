"""Which tasks say anything about presses: those that the full cache can do, and not so well that no press could lose.

Where the full cache is near the floor, eviction that beats it is noise; where it is near the ceiling, presses tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.analysis.summary import Cell, find_full

LEAST_ABOVE_FLOOR, CEILING, N_ERRORS = 0.1, 0.99, 2.0


@dataclass(frozen=True)
class TaskRange:
    """What a task can show.

    Attributes:
        task: The task.
        full: The full cache's accuracy.
        standard_error: Of that; None if the task has a single context.
        floor: The lowest accuracy that random eviction had at any ratio; 0 in a table without it.
        why_not: Why its cells do not count; empty if they do.
    """

    task: str
    full: float
    standard_error: float | None
    floor: float
    why_not: str = ""

    @property
    def counts(self) -> bool:
        """Whether differences of presses on this task mean something."""
        return not self.why_not

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        said = f"{self.task}: full cache {self.full:.2f}{error}, floor {self.floor:.2f}"
        return said if self.counts else f"{said}; does not count, {self.why_not}"


def task_ranges(task_cells: Sequence[Cell]) -> list[TaskRange]:
    """Returns what each task can show; empty for a table without a full cache, or one of agreement with it.

    A task counts if the full cache is above the floor by two of its standard errors and 0.1 besides, and below 0.99.

    Args:
        task_cells: Cells of one table, from `summarise_tasks`.
    """
    full = find_full(task_cells)
    of_full = [cell for cell in task_cells if cell.press == full and cell.kl is None]  # it agrees with itself
    return [_range(cell, _floor(cell.task, task_cells)) for cell in of_full]


def _range(cell: Cell, floor: float) -> TaskRange:
    error = N_ERRORS * (cell.standard_error or 0.0)
    why = ""
    if cell.accuracy - error < floor + LEAST_ABOVE_FLOOR:
        why = "the full cache is not clearly above the floor"
    elif cell.accuracy > CEILING:
        why = "the full cache is at the ceiling: presses near it tie"
    return TaskRange(cell.task or "", cell.accuracy, cell.standard_error, floor, why)


def _floor(task: str | None, cells: Sequence[Cell]) -> float:
    at_random = [cell.accuracy for cell in cells if cell.task == task and cell.press.lower() == "random"]
    return min(at_random, default=0.0)
