"""What every metric takes as references: texts; a single text is one of them, and never a list of its characters."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from kvzip_press.errors import InvalidArgumentError

Metric = TypeVar("Metric", bound=Callable[..., float])


def compared_with_texts(metric: Metric) -> Metric:
    """Makes a metric take references in the forms that can be meant in one way only.

    Args:
        metric: A function of a prediction, of references, and of what else it needs.

    Returns:
        The function, which reads a text as its only reference, and raises `InvalidArgumentError` for anything but a
        text or a list or tuple of texts.
    """

    @wraps(metric)
    def of_texts(prediction: str, references: Sequence[str], *args: Any, **kwargs: Any) -> float:
        return metric(prediction, _texts(references), *args, **kwargs)

    return cast(Metric, of_texts)


def _texts(given: Any) -> Sequence[str]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise InvalidArgumentError(
            f"expected references as a text or a list of texts, got {given!r:.80} ({type(given).__name__})"
        )
    return given
