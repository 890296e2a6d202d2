"""The metric of AIME and MATH: whether the result of a worked answer is right."""

import re
import threading
from collections.abc import Sequence

from kvzip_press.errors import MissingDependencyError, install_command
from kvzip_press.leaderboard.metrics.references import compared_with_texts

TIMEOUT_SECONDS = 10
MAX_CHARACTERS = 500  # of a result that is parsed: twice the longest of the benchmarks'
_NUMBER = re.compile(r"-?\d*\.?\d+")


def result(answer: str) -> str:
    r"""Returns a worked answer's result: the last ``\boxed{}``, else what follows "he answer is", else the last number.

    Empty if it has none of them.
    """
    if "\\boxed" in answer:
        return _braced(answer.rpartition("\\boxed")[2])
    if "he answer is" in answer:
        return answer.rpartition("he answer is")[2].strip().split("\n")[0].rstrip(".").strip()
    numbers = _NUMBER.findall(answer.replace(",", ""))
    return numbers[-1] if numbers else ""


@compared_with_texts
def math_equal(answer: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the answer's result equals a reference: as text, as a number (or percentage), or mathematically.

    Mathematical equality is decided by the package ``math-verify``, in at most ten seconds per reference; what takes
    longer counts as wrong, and so does a result of more than `MAX_CHARACTERS`. The limit uses an alarm of the operating
    system, which only a process's main thread can set; in other threads there is no limit.

    Raises:
        MissingDependencyError: ``math-verify`` is not installed.
    """
    found = result(answer)
    return float(bool(found) and any(_equal(found, reference) for reference in references))


def _equal(found: str, reference: str) -> bool:
    plain, wanted = (re.sub(r"\s|\$|\\!|\\,", "", text).rstrip(".") for text in (found, reference))
    numbers = _as_number(plain), _as_number(wanted)
    if plain == wanted:
        return True
    if numbers[0] is not None and numbers[1] is not None:
        return any(abs(numbers[0] - value) <= 1e-4 * max(abs(value), 1e-9) for value in _hundreds(numbers[1]))
    return len(found) <= MAX_CHARACTERS and _verified(found, reference)


def _hundreds(value: float) -> tuple[float, float, float]:
    return value, value / 100, value * 100


def _as_number(text: str) -> float | None:
    text = text.replace(",", "").removesuffix("\\%").removesuffix("%")
    try:
        return float(text)
    except ValueError:
        return None


def _verified(found: str, reference: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingDependencyError(f"MATH needs math-verify: {install_command('tasks')}") from error
    seconds = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold, given = (parse(f"${text}$", parsing_timeout=seconds, raise_on_error=False) for text in (reference, found))
    return bool(verify(gold, given, timeout_seconds=seconds, raise_on_error=False))


def _braced(text: str) -> str:
    """Returns the content of the braces that a text begins with, or its first word if it begins with none."""
    if not text.startswith("{"):
        return text.strip().split("$")[0].split(" ")[0]
    depth = 0
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:index]
    return text[1:]
