"""The tasks by name. A folder a task; its module is imported when the task is asked for."""

import difflib
import importlib
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.task import Task

TASKS = {
    "hidden_facts": "kvzip_press.leaderboard.tasks.hidden_facts.task:HiddenFactsTask",
    "profile_qa": "kvzip_press.leaderboard.tasks.profile_qa.task:ProfileQATask",
}
"""Name -> ``module:Class``."""


def get_task(name: str, **options: Any) -> Task:
    """The task of that name; options are the fields of its class.

    Raises:
        InvalidArgumentError: No such task, or no such option.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidArgumentError(f"expected a task out of {', '.join(sorted(TASKS))}, got {name!r}{hint}")
    module, _, class_name = TASKS[name].partition(":")
    task_class = getattr(importlib.import_module(module), class_name)
    try:
        task: Task = task_class(**options)
    except TypeError as error:
        raise InvalidArgumentError(f"task {name!r}: {error}") from error
    return task
