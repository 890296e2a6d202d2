"""Metrics of short answers. Each takes a prediction and the accepted answers, and gives a number in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " ") | {"'": "", "’": ""})


def normalise(text: str) -> str:
    """Lower case; punctuation becomes a space (an apostrophe nothing); articles and repeated spaces go.

    As in the metric of SQuAD, save that punctuation parts words here, so that "red-brown" has the word "red".
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the prediction is one of the references, both normalised."""
    return float(any(normalise(prediction) == normalise(reference) for reference in references))


def substring_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the words of a reference appear in a row in the prediction, both normalised.

    Whole words only: "18" is not found in "180". A reference without words never matches.
    """
    words = f" {normalise(prediction)} "
    found = (normalise(reference) for reference in references)
    return float(any(reference and f" {reference} " in words for reference in found))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall over words, both normalised; 0.0 without references."""
    return max(
        (_f1(normalise(prediction).split(), normalise(reference).split()) for reference in references), default=0.0
    )


def _f1(predicted: list[str], expected: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)
