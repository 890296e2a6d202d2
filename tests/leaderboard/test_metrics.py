"""Golden cases of the metrics, worked out by hand."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.metrics import (
    code,
    exact_match,
    fraction_found,
    mathematics,
    normalise,
    originals,
    substring_match,
    token_f1,
    words,
    words_in_order,
)

ALL = {
    name: function
    for module in (words, originals, code, mathematics)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and {"references", "functions"} & set(inspect.signature(function).parameters)
}
MORE: dict[str, tuple[Any, ...]] = {"right_class": (("4", "42"),), "mrcr": ("",), "repoqa": ("python",)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Answer,\nis: 42!", "answer is 42"),
        ("A cat and an owl", "cat and owl"),
        ("It's Nora’s", "its noras"),
        ("red-brown", "red brown"),
        ("theatre", "theatre"),
        ("", ""),
        ("the a an", ""),
    ],
)
def test_normalise_drops_case_punctuation_articles_and_spaces(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("407.", ["407"], 1.0),
        ("it is 407, I think", ["407"], 1.0),
        ("4071", ["407"], 0.0),
        ("180", ["18"], 0.0),
        ("a blue car", ["red", "blue"], 1.0),
        ("bluebird", ["blue"], 0.0),
        ("New York City", ["york city"], 1.0),
        ("York, the city", ["York City"], 1.0),
        ("city of york", ["york city"], 0.0),
        ("", ["x"], 0.0),
        ("anything", [], 0.0),
        ("anything", ["a"], 0.0),
        ("Lisbon<", ["lisbon"], 1.0),
    ],
)
def test_substring_match_finds_whole_words_in_a_row(prediction: str, references: list[str], expected: float) -> None:
    assert substring_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [("The Cat.", ["cat"], 1.0), ("cats", ["cat"], 0.0), ("b", ["a b", "b"], 1.0), ("b", [], 0.0)],
)
def test_exact_match_is_equality_after_normalising(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("red blue", ["red green"], 0.5),
        ("red", ["red green"], 2 / 3),
        ("red red", ["red"], 2 / 3),
        ("x", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("red", ["x", "the red"], 1.0),
        ("red", [], 0.0),
    ],
)
def test_token_f1_takes_the_best_reference(prediction: str, references: list[str], expected: float) -> None:
    assert token_f1(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("12, 34 and 56", ["12", "56"], 1.0),
        ("12 and 340", ["12", "34"], 0.5),
        ("", ["12"], 0.0),
        ("12", [], 0.0),
    ],
)
def test_fraction_found_counts_references(prediction: str, references: list[str], expected: float) -> None:
    assert fraction_found(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Red fox runs fast.", ["red fox runs fast"], 1.0),
        ("red fox, oh, runs", ["red fox runs fast"], 0.75),  # what is between costs nothing
        ("fast runs fox red", ["red fox runs fast"], 0.25),  # order counts
        ("", ["red"], 0.0),
        ("red", [""], 0.0),
        ("red", ["blue", "red"], 1.0),
        ("red", [], 0.0),
        ("grüne Äpfel", ["Grüne äpfel"], 1.0),
    ],
)
def test_words_in_order_is_the_part_that_is_copied(prediction: str, references: list[str], expected: float) -> None:
    assert words_in_order(prediction, references) == expected


def test_a_text_is_one_reference_and_not_its_characters() -> None:
    assert exact_match("4", "42") == 0.0
    assert exact_match("42", "42") == 1.0
    assert token_f1("4", "42") == 0.0
    assert fraction_found("24 apples", "42") == 0.0
    assert originals.ruler_all("24 apples", "42") == 0.0
    assert originals.f1("Alice", "Alice") == 1.0
    assert originals.exactly("li", "Alice") == 0.0


@pytest.mark.parametrize("name", ALL)
def test_every_metric_reads_a_text_as_one_reference_and_refuses_what_is_none(name: str) -> None:
    metric: Callable[..., float] = ALL[name]
    more = MORE.get(name, ())
    if name not in ("repoqa", "rouge_l", "code_line", "mrcr", "math_equal"):  # these need packages of their own
        assert metric("4", "42", *more) == metric("4", ["42"], *more)
    for wrong in (42, None, {"42": 1}, b"42", ["42", 42], {"42"}):
        with pytest.raises(InvalidArgumentError, match="expected references as a text or a list of texts, got"):
            metric("4", wrong, *more)
