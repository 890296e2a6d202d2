"""Finds the presses of a run that are available for a model."""

from collections.abc import Callable, Sequence
from typing import Any

from kvzip_press import get_press
from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.running.plan import PressSpec


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
            press = get_press(spec.name, compression_ratio=0.0, **spec.options)
            press.requires(model)
        except (MissingDependencyError, InvalidArgumentError) as error:
            say(f"left out: {spec.label} ({error})")
        else:
            found.append(spec)
    return tuple(found)
