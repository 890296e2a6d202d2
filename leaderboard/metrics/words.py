"""Metrics of short answers by whole words: those of the generated tasks."""

import difflib
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


def fraction_found(prediction: str, references: Sequence[str]) -> float:
    """The part of the references that `substring_match` finds; 0.0 without references."""
    found = [substring_match(prediction, [reference]) for reference in references]
    return sum(found) / len(found) if found else 0.0


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


def words_in_order(prediction: str, references: Sequence[str]) -> float:
    """The part of a reference's words that the prediction has in the same order, both normalised; of the best one.

    The words are those in the matching blocks of `difflib.SequenceMatcher`; others between them cost nothing.
    """
    words = normalise(prediction).split()
    return max((_in_order(words, normalise(reference).split()) for reference in references), default=0.0)


def _in_order(words: list[str], expected: list[str]) -> float:
    blocks = difflib.SequenceMatcher(None, words, expected, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(expected) if expected else 0.0
