"""Finds the presses of a run that are available for a model."""

from collections.abc import Callable, Sequence
from typing import Any

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.running.plan import PressSpec, Run


def available(presses: Sequence[PressSpec], model: Any, say: Callable[[str], None]) -> tuple[PressSpec, ...]:
    """Returns the presses that are installed and have what they need for the model (gates, scores of heads).

    Args:
        presses: All presses that were asked for.
        model: The model.
        say: Called with a message for each press that is left out; the message says why.
    """
    found = []
    for spec in presses:
        try:
            press = spec.press(compression_ratio=0.0)
            press.requires(model)
        except (MissingDependencyError, InvalidArgumentError) as error:
            say(f"left out: {spec.label} ({error})")
        else:
            found.append(spec)
    return tuple(found)


def check_files(run: Run) -> None:
    """Raises InvalidArgumentError for a file that a press needs and that is not there, before anything is loaded."""
    for spec in run.presses:
        for file in spec.files.values():
            try:
                file.check()
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"{spec.label}: {error}; or leave it out with --skip-unavailable") from error
